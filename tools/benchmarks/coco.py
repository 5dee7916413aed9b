"""COCO's AP at the size of val2017: ours against pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
TASKS = {"bbox": ("boxes", 5.5), "segm": ("masks", 2.2)}


@dataclass(frozen=True, kw_only=True)
class CocoAP(Work):
    """COCO box and mask AP of as many images as val2017 has."""

    name: ClassVar[str] = "coco-ap"
    title: ClassVar[str] = "COCO AP of 5,000 images"

    annotations: Path
    """An instances_*.json; its images are repeated until there are enough."""
    images: int = 5000
    false_detections: int = 18
    """An image, beside one detection for each object."""

    def ways(self) -> list[Way]:
        options = {
            "annotations": str(self.annotations),
            "images": self.images,
            "false_detections": self.false_detections,
        }
        return [
            Way(f"{said}, {name}", f"coco:{make}", {**options, "task": task})
            for task, (said, _) in TASKS.items()
            for name, make in (("pycocotools", "reference"), ("ours", "ours"))
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        return [
            Check(
                f"{said}: largest gap of the twelve numbers, points",
                float(np.abs(results[f"{said}, ours"]["numbers"] - results[f"{said}, pycocotools"]["numbers"]).max()),
                1e-8,
            )
            for said, _ in TASKS.values()
        ]

    def reaches(self) -> list[Reach]:
        return [Reach(f"{said}, ours", f"{said}, pycocotools", at_least=least) for said, least in TASKS.values()]

    @property
    def units(self) -> tuple[int, str]:
        return self.images, "image"

    @property
    def remark(self) -> str:
        return (
            "Real annotations of a COCO subset, its images repeated; detections are the objects, moved by a few "
            f"pixels, and {self.false_detections} false ones an image, in 80 classes. Both sides read ground truth and "
            "detections from memory, index, match and accumulate."
        )


def reference(*, task: str, device: str, **options: Any) -> Side:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset, results = _scene(**options)
    numbers: list[Any] = []

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = dataset
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes([_only(row, task) for row in results]), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        numbers[:] = 100 * evaluation.stats

    return Side(run, lambda: {"numbers": np.array(numbers)})


def ours(*, task: str, device: str, **options: Any) -> Side:
    from pycocotools.coco import COCO

    from robust_backbones.detection.evaluators import coco_metrics

    dataset, results = _scene(**options)
    found: dict[str, float] = {}
    truth = COCO()
    truth.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return Side(
        lambda: found.update(coco_metrics(truth, results, task)),
        lambda: {"numbers": np.array([found[name] for name in STATISTICS])},
    )


def _only(row: dict[str, Any], task: str) -> dict[str, Any]:
    """pycocotools takes a detection that has a box for one of boxes."""
    region = {"bbox": "bbox", "segm": "segmentation"}[task]
    return {key: row[key] for key in ("image_id", "category_id", "score", region)}


def _scene(*, annotations: str, images: int, false_detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A data set of ``images`` images, and detections with boxes and masks."""
    from pycocotools import mask as masks

    content = json.loads(Path(annotations).read_text())
    generator = np.random.default_rng(0)
    of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    classes = [category["id"] for category in content["categories"]]
    objects = [a for a in content["annotations"] if isinstance(a["segmentation"], list)]
    rows, truths, detections = [], [], []

    def detect(image: dict[str, Any], annotation: dict[str, Any], category: int, score: float, shift: float) -> None:
        x, y = generator.normal(0, shift, 2)
        left, top, width, height = annotation["bbox"]
        polygons = [(np.reshape(p, (-1, 2)) + np.array([x, y])).ravel().tolist() for p in annotation["segmentation"]]
        encoded = masks.merge(masks.frPyObjects(polygons, image["height"], image["width"]))
        detections.append(
            {
                "image_id": image["id"],
                "category_id": category,
                "score": score,
                "bbox": [left + x, top + y, width, height],
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
            }
        )

    for number in range(images):
        source = content["images"][number % len(content["images"])]
        image = {"id": number + 1, "height": source["height"], "width": source["width"]}
        rows.append(image)
        for annotation in of_image[source["id"]]:
            truths.append({**annotation, "id": len(truths) + 1, "image_id": image["id"]})
            if isinstance(annotation["segmentation"], list):
                detect(image, annotation, annotation["category_id"], generator.beta(4, 2), 4.0)
        for _ in range(false_detections):
            chosen = objects[generator.integers(len(objects))]
            detect(image, chosen, int(generator.choice(classes)), generator.beta(1, 4), 30.0)
    return {"images": rows, "categories": content["categories"], "annotations": truths}, detections
