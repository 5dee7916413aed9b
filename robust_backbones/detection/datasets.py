"""Detection data: registering COCO-format sets, and checking a configuration's sets before hours are spent on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.colormap import colormap

from robust_backbones.errors import InputError


def datasets_root() -> Path:
    """The folder that Detectron2's built-in data sets are looked for in."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_datasets(cfg: CfgNode) -> None:
    """Register what DATASETS.COCO_FORMAT lists; registering a name again replaces it."""
    for row in cfg.DATASETS.COCO_FORMAT:
        if len(row) != 3:
            raise InputError(f"DATASETS.COCO_FORMAT wants rows of (name, annotation file, image folder), got {row}")
        name, annotations, images = row
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        # One colour a class in pictures; without it every object gets a random one.
        colors = [tuple(color) for color in colormap(rgb=True, maximum=255).astype(int).tolist()]
        register_coco_instances(
            name, {"thing_colors": colors}, str(datasets_root() / annotations), str(datasets_root() / images)
        )


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Load every annotation and look for every image that the run will read.

    Raises:
        InputError: an unknown or missing set, a missing image, a set without objects, or a number of classes other
            than MODEL.ROI_HEADS.NUM_CLASSES.
    """
    names = list(cfg.DATASETS.TEST) if eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise InputError("the configuration names no data set: set DATASETS.TRAIN and DATASETS.TEST")
    for name in dict.fromkeys(names):
        _check(name, cfg)


def _check(name: str, cfg: CfgNode) -> None:
    if name not in DatasetCatalog:
        raise InputError(
            f"unknown data set {name!r}: use one of Detectron2's own (coco_2017_train, voc_2007_trainval, ...) "
            "or register yours with DATASETS.COCO_FORMAT"
        )
    try:
        items: list[dict[str, Any]] = DatasetCatalog.get(name)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"cannot read the data set {name} ({error}): set DETECTRON2_DATASETS to the folder that holds it "
            f"(now {datasets_root()}), in Detectron2's layout"
        ) from None
    for item in items:
        if not os.path.isfile(item["file_name"]):
            raise InputError(f"{name} has annotations for {item['file_name']}, which does not exist: add or remove it")
    if not any(item["annotations"] for item in items):
        raise InputError(f"{name} holds no annotated object: nothing can be learnt from or measured on it")
    classes = len(MetadataCatalog.get(name).thing_classes)
    if classes != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise InputError(
            f"{name} has {classes} classes but MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}: "
            f"give MODEL.ROI_HEADS.NUM_CLASSES {classes}"
        )
