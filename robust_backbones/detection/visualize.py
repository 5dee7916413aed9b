"""Pictures of objects: several detectors side by side, one beside the ground truth, or one image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from numpy.typing import NDArray

from robust_backbones.data.annotations_images import check_image
from robust_backbones.detection.datasets import check_datasets, class_names, match_classes, register_datasets
from robust_backbones.detection.predictor import Predictor, nameless
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path

TITLE_HEIGHT = 28
"""Height in pixels of the white strip above a panel."""
PANEL_WIDTH = 400


def draw_side_by_side(runs: Mapping[str, Path], output: Path, *, images: int) -> None:
    """Write a picture with one row per image of the first run's test set: ground truth, then the detections of each
    detector with a score of 0.5 or more.

    Args:
        runs: detector's name -> OUTPUT_DIR of its training, with model_final.pth.
        output: a ``.png`` or ``.jpg`` file.
        images: number of annotated images, from the first.

    Raises:
        InputError: a detector has a class that neither the test set nor the first detector has.
    """
    predictors = {name: Predictor(folder, device="cpu") for name, folder in runs.items()}
    cfg = next(iter(predictors.values())).cfg
    register_datasets(cfg)
    check_datasets(cfg, eval_only=True)
    dataset = cfg.DATASETS.TEST[0]
    if {*class_names(dataset)} < {*(names := predictors[next(iter(runs))].class_names)}:
        match_classes([dataset], names)
    classes = class_names(dataset)
    rows = []
    for item in [item for item in DatasetCatalog.get(dataset) if item["annotations"]][:images]:
        file = item["file_name"]
        found = {
            name: _in_order_of(classes, predict.class_names, objects_in(predict(file), min_score=0.5))
            for name, predict in predictors.items()
        }
        rows.append(_panels(file, {"ground truth": item["annotations"], **found}, MetadataCatalog.get(dataset)))
    if not rows:
        raise InputError(f"{dataset} has no annotated image to draw: leave out the picture")
    widest = max(row.shape[1] for row in rows)
    write_picture(output, np.vstack([np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0))) for row in rows]))


def _in_order_of(classes: list[str], names: list[str], objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Objects of a detector with the classes ``names``, numbered as in ``classes``, which has all, or as many."""
    if names == nameless(len(classes)):
        return objects
    if unknown := [name for name in names if name not in classes]:
        raise InputError(
            f"a detector of {unknown[0]!r} cannot be drawn beside the test set's classes {', '.join(classes)}: draw "
            "detectors of the same classes"
        )
    return [{**item, "category_id": classes.index(names[item["category_id"]])} for item in objects]


def ground_truth_beside_detections(
    items: Iterable[Mapping[str, Any]], detections: Iterable[Instances], metadata: Any, *, min_score: float = 0.5
) -> list[NDArray[np.uint8]]:
    """For each image a picture with its ground truth on the left and a detector's output on the right.

    Args:
        items: images as in Detectron2's data sets, with ``file_name`` and ``annotations``.
        detections: a detector's output for each of them, on the CPU, in pixels of the image file.
        metadata: the data set's; see ``draw_objects``.
        min_score: detections below it are left out.

    Returns:
        (H, W, 3) uint8 RGB each, of two panels about 400 pixels wide under their titles.
    """
    return [
        _panels(
            item["file_name"],
            {
                "ground truth": item.get("annotations", []),
                f"detections, score >= {min_score:g}": objects_in(found, min_score=min_score),
            },
            metadata,
        )
        for item, found in zip(items, detections, strict=True)
    ]


def objects_in(instances: Instances, *, min_score: float = 0.0) -> list[dict[str, Any]]:
    """Detections on the CPU for ``draw_objects``, without those that score below ``min_score``."""
    rows = instances_to_coco_json(instances, 0)
    return [{**row, "bbox_mode": BoxMode.XYWH_ABS} for row in rows if row["score"] >= min_score]


def draw_objects(
    image: NDArray[np.uint8], objects: Sequence[Mapping[str, Any]], metadata: Any, *, scale: float = 1.0
) -> NDArray[np.uint8]:
    """An image with its objects' boxes, masks, class names and scores; the colour shows the class.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: annotations in Detectron2's format: ``bbox`` in pixels, ``bbox_mode``, ``category_id`` from 0, and
            optionally ``segmentation`` (polygons or RLE), ``iscrowd``, ``score`` in [0, 1].
        metadata: of the data set; its ``thing_classes`` and ``thing_colors`` are used if it has them.
        scale: size of the picture relative to the image.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    names = metadata.get("thing_classes")
    colors = metadata.get("thing_colors") or colormap(rgb=True, maximum=255)
    labels = []
    for item in objects:
        label = names[item["category_id"]] if names else str(item["category_id"])
        label += f" {item['score']:.0%}" if "score" in item else ""
        label += " (crowd)" if item.get("iscrowd") else ""
        labels.append(label.replace("$", r"\$"))  # matplotlib would typeset what is between two of them
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
    masks = [item.get("segmentation", []) for item in objects]
    # Detectron2's own drawing of annotations and of detections gives every object a random shade of its class's colour.
    drawn = Visualizer(image, metadata, scale).overlay_instances(
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=labels,
        masks=masks if any("segmentation" in item for item in objects) else None,
        assigned_colors=[np.array(colors[item["category_id"] % len(colors)]) / 255 for item in objects],
    )
    return drawn.get_image()


def read_rgb(file_name: str | Path) -> NDArray[np.uint8]:
    """An image file as (H, W, 3) uint8 RGB, in its EXIF orientation; InputError if it cannot be read correctly."""
    check_image(file_name)
    try:
        return read_image(str(file_name), "RGB")
    except Exception as error:  # Pillow's decoders fail on damaged files in many ways
        raise InputError(f"cannot read the image {file_name}: mend or remove it") from error


def write_picture(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an (H, W, 3) uint8 RGB image to a ``.png`` or ``.jpg`` file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(path.suffix, image[:, :, ::-1])[1].tobytes())


def _panels(file_name: str, columns: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Any) -> NDArray[np.uint8]:
    """Copies of one image side by side, each with the objects of a column under its title; RGB."""
    image = read_rgb(file_name)
    panels = []
    for title, objects in columns.items():
        drawn = draw_objects(image, objects, metadata, scale=PANEL_WIDTH / image.shape[1])
        strip = np.full((TITLE_HEIGHT, drawn.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, title, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        panels.append(np.vstack([strip, drawn]))
    return np.hstack(panels)
