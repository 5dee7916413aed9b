"""Detection data: registering COCO-format sets, and checking a configuration's sets before hours are spent on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray

from robust_backbones.data.annotations_sets import AnnotatedSet
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


def categories(dataset: str) -> list[dict[str, Any]]:
    """COCO's categories of a registered set, in the order of a detector's classes: ``[{"id": 1, "name": "cat"}, ...]``.

    A set without category ids of its own counts from 1; one that is not registered has none.
    """
    metadata = MetadataCatalog.get(dataset) if dataset in DatasetCatalog else Metadata()
    ids = {place: number for number, place in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    names = enumerate(metadata.get("thing_classes", []))
    return [{"id": ids.get(place, place + 1), "name": name} for place, name in names]


def annotated_set(name: str) -> AnnotatedSet | None:
    """Where the files of a registered set are; None of one without files that we know.

    Raises:
        InputError: there is no such set.
    """
    if name not in DatasetCatalog:
        raise InputError(
            f"unknown data set {name!r}: use one of Detectron2's own (coco_2017_train, voc_2007_trainval, ...) "
            "or register yours with DATASETS.COCO_FORMAT"
        )
    metadata = MetadataCatalog.get(name).as_dict()
    if "json_file" in metadata:
        return AnnotatedSet(Path(metadata["json_file"]), Path(metadata.get("image_root", "")))
    if "dirname" in metadata:
        folder = Path(metadata["dirname"])
        return AnnotatedSet(folder, folder / "JPEGImages", metadata["split"], tuple(metadata["thing_classes"]))
    return None


def evaluator_kind(dataset: str) -> str:
    """By whose average precision a registered set is evaluated: ``pascal_voc``, or ``coco``, also where it is not said.

    Raises:
        InputError: by another one.
    """
    kind = MetadataCatalog.get(dataset).get("evaluator_type") or "coco"
    if kind not in ("coco", "pascal_voc"):
        raise InputError(f"no evaluator for {dataset} of kind {kind}: choose a COCO- or VOC-format data set")
    return str(kind)


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> list[str]:
    """Load every annotation and look for every image that the run will read.

    Returns:
        A sentence for each set with boxes that have no area or leave their image; training clips or drops these.

    Raises:
        InputError: an unknown or missing set, a missing image, a set without objects or with boxes that are no numbers,
            or a number of classes other than MODEL.ROI_HEADS.NUM_CLASSES.
    """
    names = list(cfg.DATASETS.TEST) if eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise InputError("the configuration names no data set: set DATASETS.TRAIN and DATASETS.TEST")
    if not cfg.DATASETS.TEST:
        raise InputError("the configuration names no data set to evaluate on: set DATASETS.TEST")
    return [sentence for name in dict.fromkeys(names) for sentence in _check(name, cfg)]


def _check(name: str, cfg: CfgNode) -> Iterator[str]:
    if name not in DatasetCatalog:
        raise InputError(
            f"unknown data set {name!r}: use one of Detectron2's own (coco_2017_train, voc_2007_trainval, ...) "
            "or register yours with DATASETS.COCO_FORMAT"
        )
    try:
        items: list[dict[str, Any]] = DatasetCatalog.get(name)
        boxes = [
            (*BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), item["width"], item["height"])
            for item in items
            for a in item["annotations"]
        ]
        numbers = {a["category_id"] for item in items for a in item["annotations"]}
        if name in cfg.DATASETS.TEST:
            evaluator_kind(name)
            _check_areas(name)
            for item in items:
                item["image_id"]
    except FileNotFoundError as error:
        raise InputError(f"{name} lacks {error.filename}: {_layout(name)}") from None
    except (OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ParseError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the annotations of {name} are damaged ({told}): {_layout(name)}") from None
    if missing := _missing_images(items):
        raise InputError(
            f"{name} lacks {len(missing)} of its {len(items)} images, {missing[0]} the first: {_layout(name)}, "
            "and every image that the annotations name"
        )
    if not numbers:
        raise InputError(f"{name} holds no annotated object: nothing can be learnt from or measured on it")
    classes = len(categories(name))
    if classes != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise InputError(
            f"{name} has {classes} classes but MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}: "
            + (
                f"give MODEL.ROI_HEADS.NUM_CLASSES {classes}"
                if classes
                else f"name them in MetadataCatalog.get({name!r}).thing_classes"
            )
        )
    if wrong := numbers - set(range(classes)):
        raise InputError(f"{name} has objects of class {min(wrong)}: its {classes} classes are 0 to {classes - 1}")
    if cfg.MODEL.MASK_ON and not any("segmentation" in a for item in items for a in item["annotations"]):
        raise InputError(f"{name} has boxes but no masks: give MODEL.MASK_ON False")
    yield from _check_boxes(name, np.array(boxes, np.float64))


def _check_areas(name: str) -> None:
    """COCO's AP needs them, at the end of the run; Detectron2 does not load them."""
    if (json_file := MetadataCatalog.get(name).get("json_file")) is not None:
        for annotation in json.loads(Path(json_file).read_text()).get("annotations", []):
            annotation["area"]


def _layout(name: str) -> str:
    """How the folder of data sets has to look."""
    metadata, root = MetadataCatalog.get(name), datasets_root()
    if "dirname" in metadata.as_dict():  # VOC
        year = os.path.relpath(metadata.dirname, root)
        parts = f"{year}/ImageSets/Main/{metadata.split}.txt, {year}/Annotations/*.xml and {year}/JPEGImages/*.jpg"
    elif "json_file" in metadata.as_dict():
        paths = (metadata.json_file, metadata.get("image_root"))
        parts = " and ".join(os.path.relpath(path, root) for path in paths if path)
    else:
        return "register it in Detectron2's standard format, which its tutorial on custom data sets describes"
    return f"DETECTRON2_DATASETS (now {root}) must name a folder with {parts}"


def _missing_images(items: list[dict[str, Any]]) -> list[str]:
    # One listing a folder: asking for each of COCO's 118,000 files takes minutes on a network disk.
    present: dict[str, set[str]] = {}
    missing = []
    for item in items:
        folder, file = os.path.split(item["file_name"])
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in present[folder]:
            missing.append(item["file_name"])
    return missing


def _check_boxes(name: str, boxes: NDArray[np.float64]) -> Iterator[str]:
    """``boxes``: rows of (x1, y1, x2, y2, width of the image, height of the image)."""
    left, top, right, bottom, width, height = boxes.T
    if broken := int((~np.isfinite(left + top + right + bottom)).sum()):
        raise InputError(f"{name} has {broken} boxes that are no numbers: mend or remove them")
    empty = (right <= left) | (bottom <= top)
    # A pixel is the rounding of annotations.
    outside = (left < -1) | (top < -1) | (right > width + 1) | (bottom > height + 1)
    if empty.all() or ((left >= width) | (top >= height) | (right <= 0) | (bottom <= 0)).all():
        raise InputError(
            f"none of the {len(boxes)} boxes of {name} has any area within its image: mend the annotations"
        )
    if empty.any() or outside.any():
        yield (
            f"{name}: {empty.sum()} of {len(boxes)} boxes have no area and {outside.sum()} leave their image by more "
            "than a pixel; training drops the former and clips the latter"
        )
