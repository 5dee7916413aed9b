"""Common parts of transfer experiments: the images that select a setting, the selection, and the trials' records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.batches import check_fills_batch
from robust_backbones.data.datasets import mix, skip_list, warn_of_shared
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.distributed import ALONE, Processes
from robust_backbones.runs.identity import FINGERPRINT
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.config import TransferConfig

Backbones = Mapping[str, Checkpoint | str | Path] | Sequence[str | Path]
"""Backbones by label, or files of any source (hub:NAME too), labelled by ``labels_of``."""


class TransferImages:
    """The images of an experiment: those to train on (``train``), and those of the result (``test``).

    Attributes:
        kept, held_out: indices in ``train`` of the images to train on and to evaluate on, if a setting is chosen on
            held-out images; otherwise all and none.
        outputs: of the new classifier.

    Raises:
        InputError: fewer training images than a batch, none for selection, fewer outputs than classes.
    """

    def __init__(self, config: TransferConfig, data: TransferData, *, settings: int, batch_size: int) -> None:
        self.name, self.metric, self.train, self.test = data.name, data.metric, data.train, data.test
        if config.downscale:
            self.train, self.test = (part.downscaled(config.downscale) for part in (data.train, data.test))
        if config.images_per_class:
            by_class = drawn_by_class(self.train.labels, config.data_seed)
            self.train = self.train.take(sorted(p for drawn in by_class for p in drawn[: config.images_per_class]))
        self.kept, self.held_out = list(range(len(self.train))), list[int]()
        self.selects = settings > 1 and config.select_on == "held_out"
        if self.selects:
            self.kept, self.held_out = split_held_out(self.train.labels, config.held_out, config.data_seed)
            if not self.held_out:
                raise InputError(
                    f"{data.name} has one training image a class, so that none can be held out to select: "
                    "give one setting, or --select-on test"
                )
        check_fills_batch(data.name, len(self.kept), batch_size)
        classes = len(data.train.classes)
        if 0 < config.num_outputs < classes:
            raise InputError(f"{data.name} has {classes} classes, more than {config.num_outputs} outputs: give more")
        self.outputs = config.num_outputs or classes


def split_held_out(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training images and of the held-out images, both in order.

    A rounded ``share`` of each class's images is held out: at least one if there are two, and never all.
    """
    held_out: set[int] = set()
    for drawn in drawn_by_class(labels, seed):
        held_out.update(drawn[: min(len(drawn) - 1, max(1, round(share * len(drawn))))])
    return sorted(set(range(len(labels))) - held_out), sorted(held_out)


def drawn_by_class(labels: Sequence[int], seed: int, *, stream: int = -2) -> list[list[int]]:
    """Indices of each class's images in an order drawn by ``seed`` and ``stream``, for each class independently."""
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    return [
        [positions[place] for place in _permutation(len(positions), mix(seed, label, stream)).tolist()]
        for label, positions in by_class.items()
    ]


def order_of(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The order of the images in an epoch, as ``train_batches`` has it for a data set with this seed and size."""
    return _permutation(count, mix(seed, epoch, -1))


def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def select(scores: Mapping[str, Sequence[float | None]]) -> str:
    """The setting whose trials have the highest mean score; the first of equal ones.

    Args:
        scores: for each setting, an accuracy per trial; None for a diverged trial, which excludes its setting.

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
    """Which setting was chosen, and on which images."""

    selected: str
    on: str
    """``held_out``, ``test``, or ``nothing``: there was one setting only."""
    scores: Mapping[str, Sequence[float | None]]
    """For each setting, an accuracy (0-100) per trial, on the images used for selection."""


def trial_record(
    folder: Path,
    mode: str,
    checkpoint: Checkpoint,
    data: TransferImages,
    selection: Selection,
    config: dict[str, Any],
    **fields: Any,
) -> RunRecord:
    """The record of one trial, for ``folder/record.json``; ``fields`` are further fields of it."""
    return RunRecord(
        run_id=f"{folder.parent.name}/{folder.name}",
        task="transfer",
        dataset=data.name,
        config={**config, "mode": mode, "metric": data.metric, "selection": asdict(selection)},
        **checkpoint.record_fields(label=folder.parent.name),
        **fields,
    )


def settings_of(config: dict[str, Any], checkpoints: Mapping[str, Checkpoint], data: TransferData) -> dict[str, Any]:
    """Everything that the results of an experiment depend on, for ``runs.folders.claimed``."""
    return {
        **config,
        "checkpoints": {label: checkpoint.source_sha256 for label, checkpoint in checkpoints.items()},
        "dataset": data.name,
        "metric": data.metric,
        "images": [len(data.train), len(data.test)],
        FINGERPRINT: {"train": data.train.fingerprint(), "test": data.test.fingerprint()},
    }


def without_unreadable(data: TransferData, output: Path, *, workers: int, processes: Processes = ALONE) -> TransferData:
    """``data`` without unreadable images, which ``output/skipped.json`` lists; an existing list is kept."""
    parts = {"train": data.train, "test": data.test}
    found = skip_list(output / "skipped.json", parts, workers=workers) if processes.is_main else None
    skipped = processes.broadcast(found)
    return replace(data, train=data.train.without(skipped["train"]), test=data.test.without(skipped["test"]))


def open_data(data: TransferData | str | Path) -> TransferData:
    """The data set itself, or the one in a folder with train/ and test/."""
    opened = data if isinstance(data, TransferData) else open_transfer_data(str(data), None)
    if opened.train.root != opened.test.root:  # else their lists are the data set's own
        warn_of_shared(opened.train, opened.test)
    return opened


def read_backbones(backbones: Backbones) -> dict[str, Checkpoint]:
    """The backbones by label, read if files are given; raises ``InputError`` for none, or two with the same name."""
    if not backbones:
        raise InputError("give one or more backbones")
    if not isinstance(backbones, Mapping):
        paths = [Path(path) for path in backbones]
        backbones = dict(zip(labels_of(paths), paths, strict=True))
    return {
        label: given if isinstance(given, Checkpoint) else read_checkpoint(Path(given))
        for label, given in backbones.items()
    }


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A unique name for each checkpoint: of its file, or of its folder, as our files all have the same name."""
    labels = []
    for path in paths:
        stem = str(path).removeprefix("hub:").rsplit("/", 1)[-1]
        stem = stem.rsplit(".", 1)[0] if path.suffix in (".pt", ".pth", ".pkl", ".safetensors") else stem
        labels.append(Path(os.path.abspath(path)).parent.name if stem in ("checkpoint", "best") else stem)
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two checkpoints would be called {label}: rename a file or its folder")
    return labels
