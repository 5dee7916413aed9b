"""Tables of records other than those of experiments: classifiers, their transfer, and robustness of detectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from robust_backbones.analysis.experiments import family, setting
from robust_backbones.analysis.tables import Table
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel


def record_tables(records: Sequence[RunRecord]) -> list[Table]:
    """The following tables, as far as these records can fill them."""

    def of(*tasks: str) -> list[RunRecord]:
        return [record for record in records if record.task in tasks]

    tables = [
        classification_table(of("transfer")),
        classifier_table(of("pretrain", "robustness")),
        detector_robustness_table(of("detector_robustness")),
    ]
    return [table for table in tables if table.rows]


def transfer_table(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> Table:
    """One row per backbone: its accuracy as a classifier beside the AP (0-100) of the detector that started from it.

    Args:
        pairs: (pre-training record, detection record) of each backbone.
    """
    against = sorted({classifier.config["eval_threat_model"] for classifier, _ in pairs})
    names = {"clean acc": "clean_accuracy", f"robust acc ({', '.join(against)})": "robust_accuracy"}
    for kind, metric in (("box", "bbox"), ("mask", "segm")):
        names |= {f"{kind} AP": f"{metric}/AP", f"{kind} AP50": f"{metric}/AP50"}
    rows = [
        dict[str, Any]({"backbone trained at": classifier.threat_model})
        | {head: (classifier.metrics | detector.metrics).get(name) for head, name in names.items()}
        for classifier, detector in pairs
    ]
    return Table("Transfer to detection", rows, {"backbone trained at": ":", **dict.fromkeys(names, ":.1f")})


def classifier_table(records: Sequence[RunRecord]) -> Table:
    """One row per classifier: accuracies (0-100) measured by pre-training or an attack, with 95 % intervals.

    Args:
        records: of the tasks ``pretrain`` and ``robustness``, in any order.
    """
    rows = []
    for record in sorted(records, key=lambda record: (record.task, record.dataset, record.run_id)):
        robust, against = "robust", record.config.get("eval_threat_model")
        if record.task == "robustness":
            robust, against = "pgd", f"{record.config['threat_model']}, PGD-{record.config['attack']['steps']}"
        row: dict[str, Any] = {"run": record.run_id, "task": record.task, "architecture": record.backbone.get("arch")}
        row |= {"trained at": record.threat_model or "unknown", "data set": record.dataset, "against": against}
        measured = accuracies(record, "clean", robust, "autoattack")
        rows.append({**row, **{name.replace("pgd", "robust"): value for name, value in measured.items()}})
    columns = {
        **dict.fromkeys(("run", "task", "architecture", "trained at", "data set"), ":"),
        "clean acc": with_interval("clean_accuracy"),
        "against": ":",
        "robust acc": with_interval("robust_accuracy"),
        "AutoAttack": with_interval("autoattack_accuracy"),
    }
    return Table("Classifiers", rows, columns)


def accuracies(record: RunRecord, *stages: str) -> dict[str, float | None]:
    """A record's accuracies at these stages (``clean``, ``pgd``), and the ends of their intervals, or None."""
    names = [f"{stage}_accuracy{end}" for stage in stages for end in ("", "_low", "_high")]
    return {name: record.metrics.get(name) for name in names}


def with_interval(name: str) -> tuple[str, str]:
    """The formats of an accuracy, with its interval if there is one."""
    return f"{{{name}:.1f}} ({{{name}_low:.1f}} to {{{name}_high:.1f}})", f"{{{name}:.1f}}"


def classification_table(records: Sequence[RunRecord]) -> Table:
    """One row per backbone in an experiment of classification transfer: its trials' accuracies and settings.

    Trials differ only in what ``setting`` leaves out; a backbone is identified by label, training and ``family``,
    because each seed may have its own pre-training. Accuracies are 0-100.

    Args:
        records: of task ``transfer``, in any order; duplicates count once.
    """
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        on = record.config["selection"]["on"]
        key = (record.dataset, record.config["mode"], str(record.backbone["label"]), _deviations(record), on)
        alike = json.dumps([record.threat_model, family(record), setting(record)], sort_keys=True)
        trials = groups.setdefault((*key, alike), [])
        trials += [record] if record not in trials else []
    rows = []
    for (dataset, mode, label, deviations, on, _), trials in sorted(groups.items()):
        config = trials[0].config
        values, robust = (
            [value for t in trials if (value := t.metrics.get(f"{kind}_accuracy")) is not None]
            for kind in ("clean", "robust")
        )
        against = str(config.get("eval_threat_model") or "L2:0")
        attacked = not against.endswith(":0")
        rows.append(
            {
                "data set": f"{dataset} ({config['metric']})",
                "mode": mode,
                "backbone": label,
                "trained at": str(trials[0].threat_model),
                "accuracy": mean(values) if values else None,
                "trials": len(values),
                "min": min(values, default=None),
                "max": max(values, default=None),
                "std": stdev(values) if len(values) > 1 else None,
                "robust acc": mean(robust) if attacked and robust else None,
                "against": against if attacked else None,
                "setting": ", ".join(sorted({trial.config["selection"]["selected"] for trial in trials})),
                "selected on": on,
                "epochs": None if config.get("solver") == "lbfgs" else config["epochs"],
                "otherwise": deviations or None,
            }
        )
    columns = dict.fromkeys(("data set", "mode", "backbone", "trained at"), ":")
    columns |= {"accuracy": ":.1f", "trials": ":", "min to max": "{min:.1f} to {max:.1f}", "std": ":.2f"}
    columns |= {"robust acc": "{robust acc:.1f} ({against})"}
    columns |= dict.fromkeys(("setting", "selected on", "epochs", "otherwise"), ":")
    return Table("Classification transfer, how it was set", rows, columns)


def _deviations(record: RunRecord) -> str:
    """What a record's reader must know besides its setting: all deviations from the paper."""
    config = record.config
    deviations = {
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
    return ", ".join(words for words, applies in deviations.items() if applies)


def detector_robustness_table(records: Sequence[RunRecord]) -> Table:
    """One row per detector and measure: AP (0-100) on clean and corrupted images, and under attack.

    Args:
        records: of the task ``detector_robustness``, in any order; those of single cells are skipped.
    """
    found = [record for record in records if "cells" in record.config]
    attacks = {_attack_name(cell, record): "" for record in found for cell in record.config["attacks"]}
    rows = []
    for record in sorted(found, key=lambda r: (r.dataset, r.config["adversarial_training"], str(r.threat_model))):
        cells = {"clean": "P", "mPC": "mPC", "rPC": "rPC", **attacks}
        cells |= {_attack_name(cell, record): cell for cell in record.config["attacks"]}
        for measure in (record.config["measure"], "segm/AP"):
            if f"P/{measure}" in record.metrics:
                row = {"detector": record.run_id, "data set": f"{record.dataset} (n = {record.config['images']})"}
                row |= {"backbone trained at": str(record.threat_model)}
                row |= {"fine-tuned": record.config["adversarial_training"] or "standard", "measure": measure}
                rows.append({**row, **{head: record.metrics.get(f"{cell}/{measure}") for head, cell in cells.items()}})
    columns = dict.fromkeys(("detector", "data set", "backbone trained at", "fine-tuned", "measure"), ":")
    return Table("Robustness of detectors", rows, columns | dict.fromkeys(("clean", "mPC", "rPC", *attacks), ":.1f"))


def _attack_name(cell: str, record: RunRecord) -> str:
    """The name of an attack's cell, with its ball and steps; ``worst`` has none of its own."""
    settings = record.config["attacks"][cell]
    if "threat_model" not in settings:
        return f"worst of {len(settings['attacks'])}"
    schedule = {"fixed": "PGD", "apgd": "APGD"}[settings["schedule"]]
    name = cell.removeprefix("attack-")
    return f"{name} ({ThreatModel(**settings['threat_model'])}, {schedule}-{settings['steps']})"


def provenance_table(records: Sequence[RunRecord]) -> Table:
    """One row per run: its settings, its cost, and the version of the code."""
    rows = [
        {
            "run": record.run_id,
            "task": record.task,
            "data set": record.dataset,
            "trained at": record.threat_model or "unknown",
            "seed": record.seed,
            "minutes": record.seconds / 60,
            "commit": record.git_commit and record.git_commit[:10] + "+" * record.git_commit.endswith("+"),
            "torch": record.versions.get("torch"),
            "data": _oddities(record),
        }
        for record in records
    ]
    columns = {**dict.fromkeys(("run", "task", "data set", "trained at", "seed"), ":"), "minutes": ":.1f"}
    title = "The records, and the source that made them"
    columns |= {"commit": ":", "torch": ":", **({"data": ":"} if any(row["data"] for row in rows) else {})}
    return Table(title, rows, columns)


def _oddities(record: RunRecord) -> str | None:
    """The warnings about the data, and about what was found."""
    sets = record.data_warnings.items()
    return "; ".join(f"{name}: {count} {kind}" for name, kinds in sets for kind, count in kinds.items()) or None
