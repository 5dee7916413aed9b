"""What every transfer experiment shares: a grid, the images that select from it, trials and their records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.data.datasets import find_unreadable, mix
from robust_backbones.data.transfer_datasets import TransferData
from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.files import write_json
from robust_backbones.runs.record import RunRecord

SELECT_ON = ("held_out", "test")


@dataclass(frozen=True)
class Setting:
    """One point of a grid."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr{self.lr:g}_wd{self.weight_decay:g}"


@dataclass(frozen=True)
class Penalty:
    """One point of a grid of logistic regressions."""

    value: float

    def __str__(self) -> str:
        return f"penalty{self.value:g}"


@dataclass(frozen=True)
class TransferConfig:
    """What is tried, how one setting is chosen from it, and how often the chosen one is trained.

    The defaults are the paper's grid and number of trials (Salman et al. 2020, appendix A); selection is not: the
    public code selects on the test images.
    """

    lrs: tuple[float, ...] = (0.01, 0.001)
    weight_decays: tuple[float, ...] = (5e-4,)
    seeds: tuple[int, ...] = (0, 1, 2)
    """One trial each: it decides the new classifier's first weights and the order of the images."""
    select_on: str = "held_out"
    """held_out: a part of the training images selects, and the chosen setting is then trained on all of them. test: the
    test images select, as in the public code; tables say so."""
    held_out: float = 0.2
    """Share of each class's training images that selects; a class of one image keeps it for training."""
    data_seed: int = 0
    """Draws the held-out images, and the augmentation that the trials of a linear probe share."""
    images_per_class: int = 0
    """Train on this many images a class, or all of a smaller one, drawn by ``data_seed``; 0: on all."""
    num_outputs: int = 0
    """Outputs of the new classifier; 0: one a class. (The public code has 57 for DTD's 47 classes.)"""
    normalize: bool = True
    """False feeds images in [0, 1] as they are to a network that was trained on normalised ones, as the public code
    does on most data sets."""
    downscale: int = 0
    """Reduce the shorter side of every image to this many pixels before its transform enlarges it again: with 32 all
    data sets have CIFAR's detail (Salman et al. 2020, section 4.3); 0 is off."""

    def __post_init__(self) -> None:
        if self.select_on not in SELECT_ON:
            raise InputError(f"unknown select_on {self.select_on!r}: choose one of {', '.join(SELECT_ON)}")
        for name in ("lrs", "weight_decays", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must be one or more different numbers, got {values}")
            object.__setattr__(self, name, tuple(values))  # lists come from files
        if not all(math.isfinite(lr) and lr > 0 for lr in self.lrs):
            raise InputError(f"every learning rate must be > 0, got {self.lrs}")
        if not all(math.isfinite(decay) and decay >= 0 for decay in self.weight_decays):
            raise InputError(f"every weight decay must be >= 0, got {self.weight_decays}")
        if len({str(setting) for setting in self.settings}) < len(self.settings):
            raise InputError("two settings of the grid are the same in six digits: leave one out")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of the training images, in (0, 1), got {self.held_out:g}")
        for name in ("images_per_class", "num_outputs", "downscale"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")

    @property
    def settings(self) -> list[Setting]:
        return [Setting(lr, decay) for lr in self.lrs for decay in self.weight_decays]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same before and after a trip through JSON."""
        return dict(json.loads(json.dumps(asdict(self))))


class TransferImages:
    """The images of an experiment: those that train, those that select, and those that test.

    Attributes:
        train, test: all images to train on, and those that give the result.
        kept, held_out: positions in ``train`` of those that train and of those that evaluate where a setting is chosen
            on held-out images; where none is, all and none.
        outputs: of the new classifier.

    Raises:
        InputError: fewer images to train on than a batch, none that could select, fewer outputs than classes.
    """

    def __init__(self, config: TransferConfig, data: TransferData, *, settings: int, batch_size: int) -> None:
        self.name, self.metric, self.train, self.test = data.name, data.metric, data.train, data.test
        if config.downscale:
            self.train, self.test = (part.downscaled(config.downscale) for part in (data.train, data.test))
        if config.images_per_class:
            drawn = _draw(self.train.labels, lambda count: min(count, config.images_per_class), config.data_seed)
            self.train = self.train.take(sorted(drawn))
        self.kept, self.held_out = list(range(len(self.train))), list[int]()
        self.selects = settings > 1 and config.select_on == "held_out"
        if self.selects:
            self.kept, self.held_out = split_held_out(self.train.labels, config.held_out, config.data_seed)
            if not self.held_out:
                raise InputError(
                    f"{data.name} has one training image a class, so that none can be held out to select: "
                    "give one setting, or --select-on test"
                )
        if len(self.kept) < batch_size:
            raise InputError(
                f"{data.name} has {len(self.kept)} images to train on, less than a batch: lower --batch-size"
            )
        classes = len(data.train.classes)
        if 0 < config.num_outputs < classes:
            raise InputError(f"{data.name} has {classes} classes, more than {config.num_outputs} outputs: give more")
        self.outputs = config.num_outputs or classes


def split_held_out(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the images that train and of those that select, both in order.

    Of each class ``share`` of its images is drawn, rounded, but at least one where there are two and never all.
    """
    held_out = _draw(labels, lambda count: min(count - 1, max(1, round(share * count))), seed)
    return sorted(set(range(len(labels))) - held_out), sorted(held_out)


def _draw(labels: Sequence[int], number: Callable[[int], int], seed: int) -> set[int]:
    """Positions of ``number(count)`` images of each class, of which there are ``count``; classes do not depend on each
    other."""
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    drawn: set[int] = set()
    for label, positions in by_class.items():
        generator = torch.Generator().manual_seed(mix(seed, label, -2))
        order = torch.randperm(len(positions), generator=generator).tolist()
        drawn.update(positions[place] for place in order[: number(len(positions))])
    return drawn


def select(scores: Mapping[str, Sequence[float | None]]) -> str:
    """The setting whose trials have the highest mean score; of equal ones the first.

    Args:
        scores: of each setting an accuracy a trial; None for one that diverged, which rules its setting out.

    Raises:
        TrainingFailedError: every setting diverged.
    """
    means = {
        setting: sum(score for score in trials if score is not None) / len(trials)
        for setting, trials in scores.items()
        if None not in trials
    }
    if not means:
        raise TrainingFailedError("every setting of the grid diverged: give lower learning rates (--lrs)")
    return max(means, key=lambda setting: means[setting])


@dataclass(frozen=True)
class Selection:
    """Which setting was chosen, and by what."""

    selected: str
    on: str
    """``held_out``, ``test``, or ``nothing``: there was one setting only."""
    scores: Mapping[str, Sequence[float | None]]
    """Of each setting an accuracy (0-100) a trial, on the images that selected."""


def trial_record(
    output: Path,
    *,
    mode: str,
    checkpoint: Checkpoint,
    data: TransferImages,
    metrics: dict[str, float | None],
    selection: Selection,
    seed: int,
    config: dict[str, Any],
    seconds: float,
    run: RunRecord | None = None,
    write: bool = True,
) -> RunRecord:
    """The record of one trial, written to ``output`` unless another process does that.

    Args:
        run: the training that the trial's result is from, if that has a record of its own.
    """
    record = RunRecord(
        run_id=f"{output.parent.name}/{output.name}",
        task="transfer",
        backbone={
            **checkpoint.spec.to_dict(),
            "source_sha256": checkpoint.source_sha256,
            "label": output.parent.name,
        },
        threat_model=None if checkpoint.threat_model is None else str(checkpoint.threat_model),
        dataset=data.name,
        metrics=metrics,
        seed=seed,
        config={**config, "mode": mode, "metric": data.metric, "selection": asdict(selection)},
        seconds=seconds,
    )
    if run is not None:
        record = replace(record, git_commit=run.git_commit, versions=run.versions)
    if write:
        record.write(output / "record.json")
    return record


def identity(config: dict[str, Any], checkpoints: Mapping[str, Checkpoint], data: TransferData) -> dict[str, Any]:
    """All that the results of an experiment depend on, for ``runs.identity.claim``."""
    return {
        **config,
        "checkpoints": {label: checkpoint.source_sha256 for label, checkpoint in checkpoints.items()},
        "dataset": data.name,
        "metric": data.metric,
        "images": [len(data.train), len(data.test)],
    }


def without_unreadable(data: TransferData, output: Path, *, workers: int) -> TransferData:
    """``data`` less the images that cannot be read, which ``output/skipped.json`` lists; the first list holds."""
    path = output / "skipped.json"
    if not path.exists():
        found = {part: find_unreadable(getattr(data, part), workers=workers) for part in ("train", "test")}
        write_json(path, found)
    skipped = json.loads(path.read_text())
    return replace(data, **{part: getattr(data, part).without(names) for part, names in skipped.items()})


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each checkpoint: that of its file, or of its folder where ours are all called the same.

    Raises:
        InputError: two have one name.
    """
    labels = []
    for path in paths:
        stem = str(path).removeprefix("hub:").rsplit("/", 1)[-1]
        stem = stem.rsplit(".", 1)[0] if path.suffix in (".pt", ".pth", ".pkl", ".safetensors") else stem
        labels.append(Path(os.path.abspath(path)).parent.name if stem in ("checkpoint", "best") else stem)
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two checkpoints would be called {label}: rename a file or its folder")
    return labels
