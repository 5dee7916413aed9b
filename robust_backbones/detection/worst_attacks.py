"""The cell ``attack-worst``: for each image the attack that hurts it most, from the detections of the others."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from robust_backbones.detection.datasets import evaluator_kind
from robust_backbones.detection.evaluators import VocEvaluator, coco_metrics, ground_truth
from robust_backbones.detection.hooks import flat_metrics

Row = Mapping[str, Any]
"""A detection in COCO's result format."""


def worst_attacks(truth: COCO, detections: Mapping[str, Sequence[Row]]) -> dict[Any, str]:
    """For every image the attack under which its AP is the lowest; the first of those that tie.

    AP is COCO's box AP on this image alone: the mean over 10 IoU thresholds and the classes that it shows.

    Args:
        truth: Annotations of all images.
        detections: By attack; classes and images as in ``truth``.
    """
    grouped = {name: _by_image(rows) for name, rows in detections.items()}
    chosen = {}
    for image_id in truth.imgs:
        annotations = truth.imgToAnns[image_id]
        shown = {annotation["category_id"] for annotation in annotations}
        alone = COCO()
        alone.dataset = {
            "images": [truth.imgs[image_id]],
            "categories": [truth.cats[category] for category in sorted(shown)],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            alone.createIndex()
        aps = {}
        for name, rows in grouped.items():
            seen = [row for row in rows.get(image_id, ()) if row["category_id"] in shown]
            aps[name] = coco_metrics(alone, seen, "bbox")["AP"] if annotations else math.nan
        chosen[image_id] = min(aps, key=lambda name: 0.0 if math.isnan(aps[name]) else aps[name])
    return chosen


def metrics_of(rows: Sequence[Row], dataset: str, *, masks: bool) -> dict[str, float | None]:
    """The metrics of detections as a cell's detections.json holds them, by the set's own evaluator."""
    if evaluator_kind(dataset) == "coco":
        truth = ground_truth(dataset)
        tasks = ("bbox", "segm") if masks else ("bbox",)
        return flat_metrics({task: coco_metrics(truth, rows, task) for task in tasks})
    evaluator = VocEvaluator(dataset)
    for image_id, group in _by_image(rows).items():
        boxes = torch.tensor([row["bbox"] for row in group], dtype=torch.float64)
        found = Instances((1, 1))  # VOC's evaluator does not ask for the image's size
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        found.scores = torch.tensor([row["score"] for row in group])
        found.pred_classes = torch.tensor([row["category_id"] - 1 for row in group])
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return flat_metrics(evaluator.evaluate())


def _by_image(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    grouped: dict[Any, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["image_id"], []).append(row)
    return grouped
