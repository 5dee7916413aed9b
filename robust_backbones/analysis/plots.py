"""Figures from what runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.record import RunRecord


def accuracy_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Clean (dashed) and robust (solid) validation accuracy against optimiser steps, a colour a run, as a PNG.

    Args:
        runs: label -> folder of a pre-training run, finished or not.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, folder) in enumerate(runs.items()):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "clean_accuracy" in row]
        steps = [row["step"] for row in rows]
        for metric, style in (("clean", "--"), ("robust", "-")):
            accuracy = [row[f"{metric}_accuracy"] for row in rows]
            axes.plot(steps, accuracy, style, marker=".", color=f"C{index}", label=f"{label}, {metric}")
    against = {RunRecord.read(folder / "record.json").config["eval_threat_model"] for folder in runs.values()}
    axes.set(xlabel="optimiser steps", ylabel="accuracy (%)", ylim=(0, 100), title=f"robust: {', '.join(against)}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
