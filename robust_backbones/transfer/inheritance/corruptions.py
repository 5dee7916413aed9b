"""Accuracy under the 15 common corruptions, and mCE."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.compute import Compute, available
from robust_backbones.classification.robustness import check_classes
from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES, load_library
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.transforms import EvaluationImages
from robust_backbones.errors import InputError, check_choice, check_not_negative
from robust_backbones.models import BackboneSpec, fed_as
from robust_backbones.runs.cells import run_cells
from robust_backbones.runs.folders import shared
from robust_backbones.runs.identity import FINGERPRINT, differences
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import stop_on_signals
from robust_backbones.transfer.inheritance.job import accuracy_on, for_evaluation
from robust_backbones.transfer.inheritance.make_sets import apply
from robust_backbones.transfer.inheritance.sets import RelatedSet

TASK = "corruptions"


@dataclass(frozen=True)
class CorruptionConfig(EvaluationImages):
    """The identity of an evaluation: the same config, checkpoint and images have the same accuracies.

    Corruptions are applied after cropping.
    """

    limit: int = 0
    """Only so many images, drawn by ``seed``; 0: all."""
    precision: str = "fp32"
    """fp32 or bf16."""
    seed: int = 0
    """Of the corruptions, together with each image's name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "limit")
        check_choice("precision", self.precision, ("fp32", "bf16"))


class CorruptedImages(ClassificationDataset):
    """A data set whose images have one corruption, applied after their transform; the same at every access."""

    def __init__(self, dataset: ClassificationDataset, kind: str, *, seed: int) -> None:
        self.__dict__.update(dataset.__dict__)
        self._kind, self._corruption_seed = kind, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        pixels, label = super().__getitem__(position)
        image = pixels.permute(1, 2, 0).contiguous().numpy()
        image = apply(image, self._kind, name=self.names[position], seed=self._corruption_seed)
        return torch.from_numpy(image.copy()).permute(2, 0, 1), label


def evaluate_corruptions(
    checkpoint: Checkpoint | str | Path,
    data: str | Path,
    output: str | Path,
    config: CorruptionConfig = CorruptionConfig(),
    *,
    reference: RunRecord | None = None,
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> RunRecord:
    """Accuracy on the images of ``data``, clean and under each corruption; writes records to ``output``.

    ``cells/fog-3/record.json`` and so on hold one accuracy each; finished ones are kept, and processes may share them.

    Args:
        data: folder with one folder of images per class.
        reference: the result of this function for another network on the same images, to divide by.

    Returns:
        A record with the metrics ``accuracy/clean``, ``accuracy/fog-3`` (0-100) and so on, ``mean_accuracy`` over the
        75, and with a reference ``mCE``, 100 for the reference itself (with AlexNet it is that of Hendrycks &
        Dietterich 2019).

    Raises:
        InputError: data that cannot be used; ``output`` holds another evaluation; a reference on other images.
        PreemptedError: SIGTERM or SIGUSR1 was received; finished cells are kept.
    """
    load_library()  # it says so when it is missing, before anything is written
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(Path(checkpoint))
    data, output, compute = Path(data), Path(output), Compute(available(device), config.precision)
    config = fed_as(config, checkpoint.spec)
    dataset = open_dataset(data, config.val_transform())
    check_classes(dataset.classes, data, checkpoint)
    everything = tuple(range(checkpoint.spec.num_classes))
    images = RelatedSet(data.name, dataset, everything).limited(config.limit, seed=config.seed).images
    about = {**asdict(config), "data": data.name, "images": len(images), FINGERPRINT: images.fingerprint()}
    if reference is not None:
        _check_comparable(reference, about)
    usual = asdict(fed_as(CorruptionConfig(), BackboneSpec()))
    identity = {**about, "checkpoint_sha256": checkpoint.source_sha256}
    network = for_evaluation(checkpoint.in_rgb().model().to(compute.device), compute)
    fields = {**checkpoint.record_fields(), "dataset": data.name, "seed": config.seed}

    def write(folder: Path, run_id: str, metrics: dict[str, float | None], seconds: float, **more: Any) -> RunRecord:
        record = RunRecord(run_id, TASK, metrics=metrics, config={**about, **more}, seconds=seconds, **fields)
        record.write(folder / "record.json")
        return record

    def folder(name: str) -> Path:
        return output / "cells" / name

    def run(name: str) -> str:
        start = time.perf_counter()
        shown = images if name == "clean" else CorruptedImages(images, name, seed=config.seed)
        accuracy = accuracy_on(RelatedSet(name, shown, everything), network, compute, workers=workers)
        write(folder(name), f"{output.name}/{name}", {"accuracy": accuracy}, time.perf_counter() - start)
        return f"{name}: {accuracy:.1f} %"

    names = ["clean", *(f"{corruption}-{severity}" for corruption in CORRUPTIONS for severity in SEVERITIES)]
    with shared(output, identity, usual), stop_on_signals() as stop:
        run_cells(names, folder, run, stop)
    cells = {name: RunRecord.read(folder(name) / "record.json") for name in names}
    metrics = {f"accuracy/{name}": cell.metrics["accuracy"] for name, cell in cells.items()}
    errors, about_reference = _errors(metrics), None
    metrics["mean_accuracy"] = 100 - fmean(errors.values())
    if reference is not None:
        metrics["mCE"] = mean_corruption_error(errors, _errors(reference.metrics))
        about_reference = {"run_id": reference.run_id, "backbone": reference.backbone}
    return write(output, output.name, metrics, sum(cell.seconds for cell in cells.values()), reference=about_reference)


def mean_corruption_error(errors: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """mCE = 100 x the mean over corruptions c of Σ_s E_c,s / Σ_s E^ref_c,s (Hendrycks & Dietterich 2019, section 4).

    Args:
        errors, reference: error rates (0-100) of the network and of the reference, by condition such as ``fog-3``.

    Raises:
        InputError: the reference makes no error under a corruption.
    """
    total, whole = (
        {name: sum(of[f"{name}-{severity}"] for severity in SEVERITIES) for name in CORRUPTIONS}
        for of in (errors, reference)
    )
    if faultless := [name for name in CORRUPTIONS if whole[name] == 0]:
        raise InputError(f"the reference makes no error under {faultless[0]}, by which to divide: give another")
    return 100 * fmean(total[name] / whole[name] for name in CORRUPTIONS)


def _errors(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Condition -> error rate (0-100), without the clean images."""
    found = {name.removeprefix("accuracy/"): value for name, value in metrics.items() if name.startswith("accuracy/")}
    return {name: 100 - value for name, value in found.items() if value is not None and name != "clean"}


def _check_comparable(reference: RunRecord, about: Mapping[str, Any]) -> None:
    """Raise ``InputError`` if the reference is a record of something else, or of other images."""
    if reference.task != TASK:
        raise InputError(f"the reference is a record of task {reference.task}, not of {TASK}")
    names = ("data", "images", "image_size", "val_resize", "seed", FINGERPRINT)
    held, own = ({name: config.get(name) for name in names} for config in (reference.config, about))
    if different := differences(held, own):
        raise InputError(f"the reference was measured on other images (it differs in {', '.join(different)})")
    conditions = {f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES}
    if missing := conditions - _errors(reference.metrics).keys():
        what = f"the reference {reference.run_id} has no accuracy under {min(missing)}"
        raise InputError(f"{what}: give the record.json beside the folder cells of another evaluation")
