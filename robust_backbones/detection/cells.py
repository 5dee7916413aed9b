"""Cells of a detector's robustness: one evaluation each, on the same images, changed in one way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation import inference_context
from detectron2.modeling import GeneralizedRCNN
from numpy.typing import NDArray
from tqdm import tqdm

from robust_backbones.data.corruptions import CORRUPTIONS, check_corruption, corrupt, image_seed
from robust_backbones.detection.attacks import DetectorAttack, attack_image
from robust_backbones.detection.data_stream import WorkerMapper
from robust_backbones.detection.evaluators import build_evaluator
from robust_backbones.detection.hooks import flat_metrics
from robust_backbones.detection.sanity import sanity_check
from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.runs.signals import StopRequest

CHECKED_IMAGES = 8
"""``Cell.check_change`` gets so many images, the first ones that show objects."""

Sample = dict[str, Any]
"""Detectron2's input dictionary of one image."""
Row = dict[str, Any]
"""A detection in COCO's result format."""


@dataclass(frozen=True)
class Cell:
    """One evaluation, here of the images as they are; has to be picklable."""

    name: str
    dataset: str = ""
    """A registered set, in COCO's or VOC's format; "": the configuration's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else tells this cell from another one of its name; plain JSON."""

    changes_inputs = False
    """Whether ``change`` does anything; then inputs come with their ground truth."""

    def check(self, model: GeneralizedRCNN) -> None:
        """Raise InputError where this cannot be measured of the detector."""

    def change_file(self, image: NDArray[np.uint8], file_name: str, seed: int) -> NDArray[np.uint8]:
        """The image file as it is read, (H, W, 3) RGB, before it is resized -> the same, changed."""
        return image

    def change(self, model: GeneralizedRCNN, sample: Sample, seed: int) -> tuple[Sample, dict[str, float]]:
        """The input after it is resized -> the input to detect on, and numbers whose mean over the images is a metric.

        ``model`` is in eval mode; ``sample["instances"]`` is the ground truth at the size of the input.
        """
        return sample, {}

    def check_change(self, model: GeneralizedRCNN, samples: Sequence[Sample]) -> dict[str, float]:
        """Further metrics that show whether ``change`` does what it should, on a few inputs as ``change`` gets them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CorruptionCell(Cell):
    """``CORRUPTION-SEVERITY``, of Hendrycks & Dietterich 2019; severity 0 leaves the images as they are."""

    corruption: str
    severity: int

    def change_file(self, image: NDArray[np.uint8], file_name: str, seed: int) -> NDArray[np.uint8]:
        seed = image_seed(Path(file_name).name, self.corruption, self.severity, seed)  # wherever the data set lies
        return corrupt(image, self.corruption, self.severity, seed=seed)


def corruption_cells(names: Iterable[str], severities: Iterable[int]) -> list[Cell]:
    """A cell for each corruption and severity.

    Args:
        names: Of corruptions; ``all`` alone: the 15 of Hendrycks & Dietterich 2019; ``none`` alone.
        severities: 1 to 5, or 0 for images as they are.

    Raises:
        InputError: there is no such corruption or severity.
    """
    chosen, severities = tuple(dict.fromkeys(names)), sorted(set(severities))
    if chosen in (("all",), ("none",)):
        chosen = CORRUPTIONS if chosen == ("all",) else ()
    for name in chosen:
        for severity in severities:
            check_corruption(name, severity)
    return [
        CorruptionCell(f"{name}-{severity}", corruption=name, severity=severity)
        for name in chosen
        for severity in severities
    ]


@dataclass(frozen=True, kw_only=True)
class AttackCell(Cell):
    """``attack-LOSS`` or ``attack-target-TARGET``; its metrics hold the mean of the attacked loss before and after.

    And, for epsilon above 0, what ``sanity_check`` finds.
    """

    attack: DetectorAttack

    changes_inputs = True

    def check(self, model: GeneralizedRCNN) -> None:
        self.attack.check(model)

    def change(self, model: GeneralizedRCNN, sample: Sample, seed: int) -> tuple[Sample, dict[str, float]]:
        found = attack_image(model, sample, self.attack, seed=seed)
        return found.sample, {"clean_loss": found.clean_loss, "loss": found.loss}

    def check_change(self, model: GeneralizedRCNN, samples: Sequence[Sample]) -> dict[str, float]:
        return sanity_check(model, samples, self.attack) if self.attack.threat_model.epsilon > 0 else {}


def attack_cell(attack: DetectorAttack) -> Cell:
    name = f"attack-{attack.loss}" if attack.target is None else f"attack-target-{attack.target}"
    return AttackCell(name, settings=asdict(attack), attack=attack)


def measure(
    cell: Cell,
    cfg: CfgNode,
    dataset: str,
    model: GeneralizedRCNN,
    *,
    seed: int,
    workers: int,
    stop: StopRequest,
    place: int = 0,
) -> tuple[dict[str, float | None], list[Row]]:
    """A cell's metrics, and its detections.

    Args:
        dataset: A registered set.
        seed: Decides the random numbers of corruptions and attacks.
        workers: Processes that decode and corrupt images; no result depends on it.
        stop: Looked at after each image.
        place: The line of the progress bar.

    Raises:
        PreemptedError: ``stop`` was asked for.
    """
    evaluator = build_evaluator(cfg, dataset)
    items = DatasetCatalog.get(dataset)
    loader = build_detection_test_loader(items, mapper=CellMapper(cfg, cell, seed), num_workers=workers, batch_size=1)
    if workers:  # what a corruption compiles is compiled once here instead of in every worker
        cell.change_file(np.zeros((64, 64, 3), np.uint8), "", 0)
    numbers = defaultdict[str, list[float]](list)
    checked: list[Sample] = []
    with inference_context(model), torch.no_grad():
        for (sample,) in tqdm(loader, cell.name, len(items), unit="img", position=place, leave=False, disable=None):
            check_stop(stop)
            if cell.changes_inputs:
                if len(checked) < CHECKED_IMAGES and len(sample["instances"]) > 0:
                    checked.append(sample)
                image = image_seed(Path(sample["file_name"]).name, cell.name, 0, seed)
                sample, found = cell.change(model, sample, image)
                for name, value in found.items():
                    numbers[name].append(value)
            evaluator.process([sample], model([sample]))
        further = cell.check_change(model, checked) if checked else {}
    metrics = flat_metrics(evaluator.evaluate())
    metrics |= {**further, **{name: math.fsum(values) / len(values) for name, values in numbers.items()}}
    return metrics, evaluator.results


def check_stop(stop: StopRequest) -> None:
    if stop:
        raise PreemptedError("asked to stop: finished cells are kept, and the same command continues with the others")


class CellMapper(WorkerMapper):
    """Detectron2's mapper for tests, after what the cell does to the file; with ground truth where inputs change."""

    def __init__(self, cfg: CfgNode, cell: Cell, seed: int) -> None:
        mapper = DatasetMapper(cfg, is_train=False)
        mapper.is_train = cell.changes_inputs  # turns annotations into instances; the augmentation stays as it is
        super().__init__(mapper)
        self._cell, self._seed = cell, seed
        self._resize = mapper.augmentations.augs
        self._changes_files = type(cell).change_file is not Cell.change_file
        order = cfg.INPUT.FORMAT
        if self._changes_files and order not in ("RGB", "BGR"):
            raise InputError(f"corruptions are of colour images, not of INPUT.FORMAT {order}: give RGB or BGR")
        self._channels = slice(None, None, -1 if order == "BGR" else 1)

    def __call__(self, item: Sample) -> Sample:
        def change(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            rgb = np.ascontiguousarray(image[..., self._channels])
            return self._cell.change_file(rgb, item["file_name"], self._seed)[..., self._channels]

        if self._changes_files:
            self.mapper.augmentations = T.AugmentationList([T.ColorTransform(change), *self._resize])
        try:
            return super().__call__(item)
        except (OSError, SizeMismatchError) as error:
            raise InputError(f"cannot read {item['file_name']}: {' '.join(str(error).split())}") from None
