"""Tables from run records, in Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel


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

    rows = [
        [
            label,
            str(training.threat_model),
            str(training.config["epochs"]),
            f"{training.seconds / 60:.0f}",
            _with_interval(evaluation.metrics, "clean"),
            _with_interval(evaluation.metrics, "pgd"),
        ]
        for label, (training, evaluation) in records.items()
    ]
    return markdown(heads, rows)


def classification_table(records: Sequence[RunRecord]) -> str:
    """One row an experiment of classification transfer: its trials' accuracies (0-100), and how it was set.

    Args:
        records: of task ``transfer``, in any order.
    """
    return markdown(*classification_rows(records))


def classification_rows(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of ``classification_table``."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        recipe = {name: value for name, value in record.config.items() if name not in _OF_A_TRIAL}
        on = record.config["selection"]["on"]
        key = (record.dataset, record.config["mode"], str(record.backbone["label"]), _way(record), on, str(recipe))
        groups.setdefault(key, []).append(record)
    heads = ["data set", "mode", "backbone", "trained at", "accuracy", "trials", "min to max", "std"]
    heads += ["robust acc", "setting", "selected on", "epochs", "otherwise"]
    rows = []
    for (dataset, mode, label, way, on, _), trials in sorted(groups.items()):
        values = [trial.metrics["clean_accuracy"] or 0.0 for trial in trials]
        against = str(trials[0].config.get("eval_threat_model") or "L2:0")
        robust = [] if against.endswith(":0") else [trial.metrics.get("robust_accuracy") or 0.0 for trial in trials]
        regression = trials[0].config.get("solver") == "lbfgs"
        rows.append(
            [
                f"{dataset} ({trials[0].config['metric']})",
                mode,
                label,
                str(trials[0].threat_model),
                f"{mean(values):.1f}",
                str(len(values)),
                f"{min(values):.1f} to {max(values):.1f}",
                f"{stdev(values):.2f}" if len(values) > 1 else "-",
                f"{mean(robust):.1f} ({against})" if robust else "-",
                ", ".join(sorted({trial.config["selection"]["selected"] for trial in trials})),
                on,
                "-" if regression else str(trials[0].config["epochs"]),
                way or "-",
            ]
        )
    return heads, rows


_OF_A_TRIAL = ("selection", "seed", "run", "lr", "weight_decay")
"""Of a record's config, what may differ between the trials of an experiment."""


def _way(record: RunRecord) -> str:
    """What a record's reader must know beside its setting: whatever is not as the paper describes it."""
    config = record.config
    ways = {
        "L-BFGS": config.get("solver") == "lbfgs",
        "no augmentation": config.get("augmentation") == "none" and config.get("solver") != "lbfgs",
        f"{config.get('views')} cached views": config.get("views", 0) > 0,
        "trained batch statistics": config.get("batch_norm") == "train",
        "images not normalised": not config["normalize"],
        f"{config['num_outputs']} outputs": config["num_outputs"] > 0,
        f"{config['images_per_class']} training images a class": config["images_per_class"] > 0,
        f"first {config.get('freeze')} groups frozen": config.get("freeze", 0) > 0,
        f"layer-wise rates x{config.get('layer_decay')}": config.get("layer_decay", 1.0) < 1,
        f"images reduced to {config.get('downscale')} px": config.get("downscale", 0) > 0,
        f"fine-tuned at {config.get('threat_model')}": not str(config.get("threat_model", "L2:0")).endswith(":0"),
    }
    return ", ".join(way for way, applies in ways.items() if applies)


def classifier_rows(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a row a classifier: accuracies (0-100) as pre-training or an attack measured them.

    Those under attack have their 95 % intervals.

    Args:
        records: of the tasks ``pretrain`` and ``robustness``, in any order.
    """
    heads = [
        "run",
        "task",
        "architecture",
        "trained at",
        "data set",
        "clean acc",
        "against",
        "robust acc",
        "AutoAttack",
    ]
    rows = []
    for record in sorted(records, key=lambda record: (record.task, record.dataset, record.run_id)):
        robust, against = "robust", str(record.config.get("eval_threat_model") or "-")
        if record.task == "robustness":
            robust = "pgd"
            against = f"{record.config['threat_model']}, PGD-{record.config['attack']['steps']}"
        accuracies = [_with_interval(record.metrics, stage) for stage in ("clean", robust, "autoattack")]
        kind = [
            record.run_id,
            record.task,
            str(record.backbone.get("arch", "-")),
            str(record.threat_model or "unknown"),
        ]
        rows.append([*kind, record.dataset, accuracies[0], against, *accuracies[1:]])
    return heads, rows


def detector_robustness_rows(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a row a detector and measure: AP (0-100) on clean and corrupted images, and under attack.

    Args:
        records: of the task ``detector_robustness``, in any order; those of single cells are passed over.
    """
    found = [record for record in records if "cells" in record.config]
    attacks = list(dict.fromkeys(_attack_name(name, one) for one in found for name in one.config["attacks"]))
    heads = ["detector", "data set", "backbone trained at", "fine-tuned", "measure", "clean", "mPC", "rPC", *attacks]
    rows = []
    order = sorted(found, key=lambda r: (r.dataset, r.config["adversarial_training"], str(r.threat_model)))
    for record in order:
        kind = [record.run_id, f"{record.dataset} (n = {record.config['images']})", str(record.threat_model)]
        kind.append(record.config["adversarial_training"] or "standard")
        for measure in (record.config["measure"], "segm/AP"):
            if f"P/{measure}" not in record.metrics:
                continue
            names = {_attack_name(name, record): f"{name}/{measure}" for name in record.config["attacks"]}
            columns = [f"{name}/{measure}" for name in ("P", "mPC", "rPC")] + [names.get(name, "") for name in attacks]
            values = [record.metrics.get(column) for column in columns]
            rows.append([*kind, measure, *("-" if value is None else f"{value:.1f}" for value in values)])
    return heads, rows


def _attack_name(cell: str, record: RunRecord) -> str:
    """A cell of an attack, with its ball and steps; ``worst`` has none of its own."""
    settings = record.config["attacks"][cell]
    name = cell.removeprefix("attack-")
    if "threat_model" not in settings:
        return f"worst of {len(settings['attacks'])}"
    schedule = {"fixed": "PGD", "apgd": "APGD"}[settings["schedule"]]
    return f"{name} ({ThreatModel(**settings['threat_model'])}, {schedule}-{settings['steps']})"


def _with_interval(metrics: Mapping[str, float | None], stage: str) -> str:
    value, low, high = (metrics.get(f"{stage}_accuracy{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as RFC 4180 has it, with plain line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def latex(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, label: str, notes: Sequence[str]
) -> str:
    """A table environment that needs no package; text is escaped, and notes stand below in small print."""
    lines = [" & ".join(map(_latex_text, line)) + r" \\" for line in [heads, *rows]]
    columns = "l" * 2 + "r" * (len(heads) - 3) + r"p{0.3\textwidth}"
    below = "".join(f"\\par {_latex_text(note)}\n" for note in notes)
    return (
        "\\begin{table}\n\\centering\\footnotesize\n"
        f"\\caption{{{_latex_text(caption)}}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\hline\n"
        + "\n".join([lines[0], r"\hline", *lines[1:], r"\hline"])
        + f"\n\\end{{tabular}}\n{below}\\end{{table}}\n"
    )


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "ε": r"$\varepsilon$",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
