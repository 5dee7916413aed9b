"""Markdown tables from run records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return markdown(heads, rows)


def robustness_table(records: Mapping[str, tuple[RunRecord, RunRecord]]) -> str:
    """One row a classifier: its training and its accuracies (0-100), clean and under PGD, with their 95 % intervals.

    Args:
        records: label -> (pre-training record, robustness record).
    """
    heads = ["training", "trained at", "epochs", "minutes", "clean acc", "robust acc"]
    against = {f"{e.config['threat_model']}, PGD-{e.config['attack']['steps']}" for _, e in records.values()}
    heads[-1] += f" ({'; '.join(sorted(against))})"

    def with_interval(metrics: Mapping[str, float | None], stage: str) -> str:
        low, high = metrics[f"{stage}_accuracy_low"], metrics[f"{stage}_accuracy_high"]
        return f"{metrics[f'{stage}_accuracy']:.1f} ({low:.1f} to {high:.1f})"

    rows = [
        [
            label,
            str(training.threat_model),
            str(training.config["epochs"]),
            f"{training.seconds / 60:.0f}",
            with_interval(evaluation.metrics, "clean"),
            with_interval(evaluation.metrics, "pgd"),
        ]
        for label, (training, evaluation) in records.items()
    ]
    return markdown(heads, rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
