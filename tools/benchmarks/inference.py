"""Mask R-CNN on photographs, with COCO's evaluation: ours against Detectron2's."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.detectors import random_detector
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work

DETECTRON2, OURS = "Detectron2", "ours"


@dataclass(frozen=True, kw_only=True)
class Inference(Work):
    """Detection by Mask R-CNN R50-FPN and its box and mask AP."""

    name: ClassVar[str] = "inference"
    title: ClassVar[str] = "Mask R-CNN R50-FPN on photographs, with COCO evaluation"
    on_gpu: ClassVar[bool] = True

    coco: Path
    """A folder with val2017/ and annotations/instances_val2017.json."""
    images: int = 8
    short_side: int = 0
    """Pixels; 0: 800 on a GPU, 320 on a CPU."""

    @property
    def _side(self) -> int:
        return self.short_side or (800 if self.device == "cuda" else 320)

    def ways(self) -> list[Way]:
        options = {"coco": str(self.coco), "images": self.images, "short_side": self._side}
        return [Way(name, "inference:side", {**options, "ours": name == OURS}) for name in (DETECTRON2, OURS)]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """Random weights have an AP of 0: the masks themselves are compared."""
        masks, theirs = (Counter(results[way]["masks"].tolist()) for way in (OURS, DETECTRON2))
        different = 100 * (1 - (masks & theirs).total() / max(theirs.total(), 1))
        return [
            Check("encoded masks that differ, percent", different, 0 if self.device == "cpu" else 1),
            Check("masks that Detectron2 finds less ours", abs(theirs.total() - masks.total()), 0),
        ]

    def reaches(self) -> list[Reach]:
        return [Reach(OURS, DETECTRON2, at_least=2.0)] if self.device == "cuda" else []

    @property
    def units(self) -> tuple[int, str]:
        return self.images, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.images} photographs of COCO, decoded beforehand, one at a time with a short side of {self._side} "
            "px, random weights, at most 100 objects each; their masks are pasted into the photographs and encoded, "
            "and AP is computed, by pycocotools in Detectron2's row."
        )


def side(*, coco: str, images: int, short_side: int, ours: bool, device: str) -> Side:
    with tempfile.TemporaryDirectory() as folder:
        model, batches, evaluator = _scene(Path(coco), images, short_side, Path(folder), ours=ours, device=device)
    from detectron2.evaluation import inference_on_dataset

    def masks() -> Arrays:
        rows = evaluator.results if ours else [row for each in evaluator._predictions for row in each["instances"]]
        return {"masks": np.array([zlib.crc32(row["segmentation"]["counts"].encode()) for row in rows])}

    return Side(lambda: inference_on_dataset(model, batches, evaluator), masks)


def _scene(
    coco: Path, images: int, short_side: int, folder: Path, *, ours: bool, device: str
) -> tuple[Any, list[Any], Any]:
    """(Model, batches of one image, evaluator)."""
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    content["images"] = content["images"][:images]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in chosen]
    annotations = folder / "instances.json"
    annotations.write_text(json.dumps(content))
    overrides: list[object] = [
        *("DATASETS.COCO_FORMAT", (("photographs", str(annotations), str(coco / "val2017")),)),
        *("DATASETS.TEST", ("photographs",), "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TEST", short_side),
    ]
    cfg, model, _ = random_detector(
        (32, 32), images=1, device=device, fast_roi_align=True if ours else None, overrides=overrides
    )
    with torch.no_grad():  # random weights find nothing that scores more than TEST's threshold
        model.roi_heads.box_predictor.cls_score.weight *= 30

    from detectron2.evaluation import COCOEvaluator

    from robust_backbones.detection.datasets import register_datasets
    from robust_backbones.detection.evaluators import CocoEvaluator
    from robust_backbones.detection.trainer import Trainer

    register_datasets(cfg)
    batches = list(Trainer.build_test_loader(cfg, "photographs"))
    tasks = ("bbox", "segm")
    evaluator = CocoEvaluator if ours else partial(COCOEvaluator, use_fast_impl=False)
    return model.eval(), batches, evaluator("photographs", tasks)
