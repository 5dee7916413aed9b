"""Markdown tables from run records."""

from __future__ import annotations

from collections.abc import Sequence

from robust_backbones.records import RunRecord


def transfer_table(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> str:
    """One row a backbone: its accuracy as a classifier beside the AP of the detector that started from it.

    Args:
        pairs: (pre-training record, detection record) of each backbone.

    Returns:
        A Markdown table, all values 0-100; ``-`` where a detector has no masks.
    """
    heads = ["backbone trained at", "clean acc", "robust acc", "box AP", "box AP50", "mask AP", "mask AP50"]
    rows = []
    for classifier, detector in pairs:
        accuracies = [classifier.metrics["clean_accuracy"], classifier.metrics["robust_accuracy"]]
        averages = [detector.metrics.get(name) for name in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")]
        values = ["-" if value is None else f"{value:.1f}" for value in accuracies + averages]
        rows.append([str(classifier.threat_model), *values])
    against = sorted({classifier.config["eval_threat_model"] for classifier, _ in pairs})
    heads[2] += f" ({', '.join(against)})"
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
