"""What adversarial training buys: two trainings of one budget, without and with an adversary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from robust_backbones.analysis.figures import COLORS, MARKERS, MOST_CURVES, Picture, save
from robust_backbones.analysis.record_tables import accuracies, with_interval
from robust_backbones.analysis.tables import Table
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import Execution
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.classification.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

THREAT_MODEL = ThreatModel("Linf", 8 / 255)
TRAINING = PretrainConfig(
    eval_threat_model=THREAT_MODEL,
    arch="resnet18",
    eval_attack=AttackConfig(steps=20, relative_step_size=0.25, random_start=True),
    epochs=4,
    batch_size=64,
    lr=0.1,
    schedule="one_cycle",
    weight_decay=5e-4,
    augmentation="padded_crop",
    image_size=32,
    val_resize=32,
    precision="bf16",
    eval_images=1000,
)


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Train with and without an adversary on one budget; a table and the curves of both."""

    data: Path
    """Folder that holds train/ and val/ with images of 32 px."""
    output: Path
    """Folder for both runs, table.md and curves.png."""
    epochs: int = TRAINING.epochs
    batch_size: int = TRAINING.batch_size
    stem: str = TRAINING.stem
    """cifar costs ten times the arithmetic of imagenet, and is what 32 px images deserve."""
    images: int = 2000
    """Validation images of the final measurement; the curves are on 1000."""
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 1

    def measure(self) -> str:
        """The table; goes on where it was cut off."""
        execution = Execution(device=self.device, workers=self.workers)
        folders, records = {}, {}
        for name, trained_at in (("standard", ThreatModel()), ("robust", THREAT_MODEL)):
            print(f"== {name} training ({trained_at})", flush=True)
            folders[name] = self.output / name
            config = replace(
                TRAINING,
                threat_model=trained_at,
                epochs=self.epochs,
                batch_size=self.batch_size,
                stem=self.stem,
                seed=self.seed,
            )
            training = pretrain(config, self.data, folders[name], execution)
            evaluation = evaluate_robustness(
                RobustnessConfig(
                    THREAT_MODEL,
                    TRAINING.eval_attack,
                    autoattack=False,
                    limit=self.images,
                    image_size=32,
                    val_resize=32,
                ),
                read_checkpoint(folders[name] / "checkpoint.pt"),
                self.data / "val",
                self.output / f"{name}_evaluation",
                device=self.device,
                workers=self.workers,
            )
            records[name] = (training, evaluation)
        accuracy_curves(folders, self.output / "curves")
        table = robustness_table(records).to_markdown()
        with atomic_path(self.output / "table.md") as temporary:
            temporary.write_text(table + "\n")
        return table


def robustness_table(records: Mapping[str, tuple[RunRecord, RunRecord]]) -> Table:
    """One row a classifier: its training and its accuracies (0-100), clean and under PGD, with their 95 % intervals.

    Args:
        records: label -> (pre-training record, robustness record).
    """
    against = sorted({f"{e.config['threat_model']}, PGD-{e.config['attack']['steps']}" for _, e in records.values()})
    columns = {
        **dict.fromkeys(("training", "trained at", "epochs"), ":"),
        "minutes": ":.0f",
        "clean acc": with_interval("clean_accuracy"),
        f"robust acc ({'; '.join(against)})": with_interval("pgd_accuracy"),
    }
    rows = [
        {"training": label, "trained at": training.threat_model, "epochs": training.config["epochs"]}
        | {"minutes": training.seconds / 60, **accuracies(evaluation, "clean", "pgd")}
        for label, (training, evaluation) in records.items()
    ]
    return Table("Robustness of classifiers", rows, columns)


def accuracy_curves(runs: Mapping[str, Path], path: Path) -> Picture:
    """Clean (dashed) and robust (solid) validation accuracy against optimiser steps, a colour a run.

    Args:
        runs: label -> folder of a finished pre-training run.
        path: of the figure's files, without their suffixes.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    numbers: list[dict[str, Any]] = []
    for index, (label, folder) in enumerate(runs.items()):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "clean_accuracy" in row]
        steps = [row["step"] for row in rows]
        for metric, style in (("clean", "--"), ("robust", "-")):
            accuracy = [row[f"{metric}_accuracy"] for row in rows]
            color, marker = COLORS[index % MOST_CURVES], MARKERS[index % MOST_CURVES]
            axes.plot(steps, accuracy, style, marker=marker, markersize=4, color=color, label=f"{label}, {metric}")
        names = ("step", "clean_accuracy", "robust_accuracy")
        numbers += [{"run": label, **{name: row[name] for name in names}} for row in rows]
    against = {RunRecord.read(folder / "record.json").config["eval_threat_model"] for folder in runs.values()}
    axes.set(xlabel="optimiser steps", ylabel="accuracy (%)", ylim=(0, 100), title=f"robust: {', '.join(against)}")
    axes.grid(alpha=0.3)
    axes.legend()
    caption = "Validation accuracy against optimiser steps: clean (dashed) and robust (solid)."
    return save(figure, path, numbers, caption, f"Accuracy of {' and '.join(runs)} against optimiser steps.")
