"""Cells of a detector's robustness: each is one evaluation on the same images, changed in one way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from robust_backbones.data.annotations_values import box_polygon
from robust_backbones.data.corruptions import CORRUPTIONS, check_corruption, corrupt, image_seed
from robust_backbones.detection.attacks import Detector, DetectorAttack, attack_image, sanity_check
from robust_backbones.detection.data_stream import MaskMapper, WorkerMapper
from robust_backbones.errors import InputError

Sample = dict[str, Any]
"""Detectron2's input dictionary of one image."""
Row = dict[str, Any]
"""A detection in COCO's result format."""


@dataclass(frozen=True)
class Cell:
    """One evaluation, here on unchanged images; must be picklable."""

    name: str
    dataset: str = ""
    """A registered set, in COCO's or VOC's format; "": the configuration's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that distinguish this cell from another one of its name; plain JSON."""

    changes_inputs = False
    """Whether ``change`` does anything; if so, inputs come with their ground truth."""

    def check(self, model: Detector) -> None:
        """Raise InputError if this cannot be measured for the detector."""

    def change_file(self, image: NDArray[np.uint8], file_name: str, seed: int) -> NDArray[np.uint8]:
        """The image as read from its file, (H, W, 3) RGB, before resizing -> the changed image."""
        return image

    def change(self, model: Detector, sample: Sample, seed: int) -> tuple[Sample, dict[str, float]]:
        """The input after resizing -> the input to detect on, and numbers whose mean over the images is a metric.

        ``model`` is in eval mode; ``sample["instances"]`` is the ground truth at the size of the input.
        """
        return sample, {}

    def check_change(self, model: Detector, samples: Sequence[Sample]) -> dict[str, float]:
        """Further metrics that show whether ``change`` works as it should, on a few of its inputs."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CorruptionCell(Cell):
    """``CORRUPTION-SEVERITY``, of Hendrycks & Dietterich 2019; severity 0 does not change the images."""

    corruption: str
    severity: int

    def change_file(self, image: NDArray[np.uint8], file_name: str, seed: int) -> NDArray[np.uint8]:
        seed = image_seed(Path(file_name).name, self.corruption, self.severity, seed)  # wherever the data set lies
        return corrupt(image, self.corruption, self.severity, seed=seed)


def corruption_cells(names: Iterable[str], severities: Iterable[int]) -> list[Cell]:
    """A cell for each corruption (``all`` alone: the 15 of Hendrycks & Dietterich 2019; or ``none``) and severity.

    InputError if there is no such corruption or severity.
    """
    chosen, severities = tuple(dict.fromkeys(names)), sorted(set(severities))
    if chosen in (("all",), ("none",)):
        chosen = CORRUPTIONS if chosen == ("all",) else ()
    for name in chosen or CORRUPTIONS[:1]:  # without a corruption its severities are checked all the same
        for severity in severities:
            check_corruption(name, severity)
    return [
        CorruptionCell(f"{name}-{severity}", corruption=name, severity=severity)
        for name in chosen
        for severity in severities
    ]


@dataclass(frozen=True, kw_only=True)
class AttackCell(Cell):
    """Its metrics: the mean of the attacked loss before and after and, for epsilon above 0, ``sanity_check``'s."""

    attack: DetectorAttack

    changes_inputs = True

    def check(self, model: Detector) -> None:
        self.attack.check(model)

    def change(self, model: Detector, sample: Sample, seed: int) -> tuple[Sample, dict[str, float]]:
        found = attack_image(model, sample, self.attack, seed=seed)
        return found.sample, {"clean_loss": found.clean_loss, "loss": found.loss}

    def check_change(self, model: Detector, samples: Sequence[Sample]) -> dict[str, float]:
        return sanity_check(model, samples, self.attack) if self.attack.threat_model.epsilon > 0 else {}


def attack_cell(attack: DetectorAttack) -> Cell:
    name = f"attack-{attack.loss}" if attack.target is None else f"attack-target-{attack.target}"
    return AttackCell(name, settings=asdict(attack), attack=attack)


class CellMapper(WorkerMapper):
    """Detectron2's mapper for tests, after the cell has changed the file; with ground truth if inputs change.

    In this ground truth, an object without a usable mask has one that fills its box, the size that mask AP gives it.
    """

    def __init__(self, cfg: CfgNode, cell: Cell, seed: int) -> None:
        mapper = MaskMapper(cfg, is_train=False)
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
        if self._cell.changes_inputs:
            item = {**item, "annotations": [_with_mask(thing) for thing in item["annotations"]]}
        return super().__call__(item)


def _with_mask(thing: Mapping[str, Any]) -> Mapping[str, Any]:
    if "segmentation" in thing:
        return thing
    box = BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYWH_ABS)
    return {**thing, "segmentation": box_polygon(box)}
