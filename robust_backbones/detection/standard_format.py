"""Annotated sets in Detectron2's standard format, read from COCO's and VOC's, and as COCO's content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_tools

from robust_backbones.data.annotations import Content, Use
from robust_backbones.data.annotations_values import FLAT, is_number, mask_problem, run_lengths, usable_mask
from robust_backbones.data.annotations_voc import read_voc
from robust_backbones.errors import InputError

Items = list[dict[str, Any]]
"""Images and their objects, in Detectron2's standard format."""


def register(name: str, load: Callable[[], Items], metadata: Mapping[str, Any]) -> None:
    """Register a set, replacing one of this name."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**{**metadata, "name": name})


def load_voc(folder: str, split: str, classes: Sequence[str]) -> Items:
    """Like Detectron2's ``load_voc_instances``, but with images of any format and names with spaces."""
    content, _ = read_voc(folder, split, classes)
    items = _without_objects(content["images"], os.path.join(folder, "JPEGImages"))
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        box = {"bbox": [x, y, x + width, y + height], "bbox_mode": BoxMode.XYXY_ABS}
        items[row["image_id"]]["annotations"].append({**box, "category_id": row["category_id"] - 1})
    return list(items.values())


def load_coco(file: str, folder: str, name: str) -> Items:
    """Like Detectron2's ``load_coco_json``, which leaves out or fails at objects without a usable polygon."""
    content = json.loads(Path(file).read_bytes())
    rows = sorted(content["categories"], key=lambda row: row["id"])
    numbers = {row["id"]: number for number, row in enumerate(rows)}
    classes, metadata = [row["name"] for row in rows], MetadataCatalog.get(name)
    if (declared := list(metadata.get("thing_classes", classes))) != classes:
        raise InputError(
            f"{name} is registered with the classes {listed(declared)}, but {file} has {listed(classes)}, by their "
            "ids: register it without thing_classes"
        )
    metadata.set(thing_classes=metadata.get("thing_classes", classes), thing_dataset_id_to_contiguous_id=numbers)
    items = _without_objects(sorted(content["images"], key=lambda row: row["id"]), folder)
    for row in content.get("annotations", []):
        thing = {key: row[key] for key in ("iscrowd", "bbox") if key in row}
        thing |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": numbers[row["category_id"]]}
        image = items[row["image_id"]]
        mask = row.get("segmentation")
        problem = mask_problem(mask, image["width"], image["height"])
        # Where masks are used, the check has refused broken ones; boxes alone do without.
        if problem is None or problem[1] == FLAT:
            mask = usable_mask(mask) or [polygon for polygon in mask if len(polygon) > 5]
            thing["segmentation"] = run_lengths(mask) if isinstance(mask, dict) else mask
        points = row.get("keypoints")  # pixel indices, but for the visibility
        if points and isinstance(points, list) and all(map(is_number, points)):
            thing["keypoints"] = [value + 0.5 if place % 3 != 2 else value for place, value in enumerate(points)]
        image["annotations"].append(thing)
    return list(items.values())


def _without_objects(images: Sequence[Mapping[str, Any]], folder: str) -> dict[Any, dict[str, Any]]:
    """COCO's image rows in Detectron2's format, by id."""
    return {
        row["id"]: {
            "file_name": os.path.join(folder, row["file_name"]),
            "height": row["height"],
            "width": row["width"],
            "image_id": row["id"],
            "annotations": [],
        }
        for row in images
    }


def content_of(items: Items, classes: Sequence[str], use: Use) -> Content:
    """Detectron2's dictionaries as COCO's content; bit masks, which may be arrays, as run lengths."""
    content: Content = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(classes)]
    for number, item in enumerate(items):
        image = _plain(item["image_id"]) if use.evaluation else number  # else nothing needs the name
        sides = {side: _plain(item[side]) for side in ("width", "height")}
        content["images"].append({"id": image, "file_name": str(item["file_name"]), **sides})
        for thing in item["annotations"]:
            x1, y1, x2, y2 = map(float, BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYXY_ABS))
            box = [x1, y1, x2 - x1, y2 - y1]
            mask = thing.get("segmentation") if use.masks else None
            if isinstance(mask, np.ndarray):
                mask = mask_tools.encode(np.asfortranarray(mask, np.uint8))
            if isinstance(mask, list):
                mask = [list(polygon) for polygon in mask]
            elif isinstance(mask, dict) and isinstance(mask.get("counts"), bytes):
                mask = {**mask, "counts": mask["counts"].decode()}
            row = {"id": len(content["annotations"]), "image_id": image, "bbox": box, "area": box[2] * box[3]}
            row |= {"category_id": _plain(thing["category_id"]), "iscrowd": _plain(thing.get("iscrowd", 0))}
            content["annotations"].append({**row, "segmentation": mask})
    return content


def _plain(value: Any) -> Any:
    """A NumPy number as a Python one."""
    return value.item() if isinstance(value, np.generic) else value


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
