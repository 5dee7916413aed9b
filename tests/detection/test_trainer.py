"""What is measured at the end of a run: the evaluators' edge cases and the record's metrics."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.trainer import Trainer, flat_metrics


@pytest.fixture
def cfg(small_cfg: CfgNode, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    register_datasets(small_cfg)
    small_cfg.OUTPUT_DIR = str(tmp_path)
    return small_cfg


def evaluate(cfg: CfgNode, *, perfect: bool) -> dict[str, float | None]:
    """The metrics of a detector that repeats the ground truth's boxes with full masks, or finds nothing."""
    evaluator = Trainer.build_evaluator(cfg, "shapes_val")
    evaluator.reset()
    for item in DatasetCatalog.get("shapes_val"):
        objects = item["annotations"] if perfect else []
        size = (item["height"], item["width"])
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        masks = torch.zeros(len(objects), *size, dtype=torch.bool)
        for mask, (x, y, width, height) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y : y + height, x : x + width] = True
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
        found = Instances(
            size, pred_boxes=Boxes(boxes), scores=torch.ones(len(objects)), pred_classes=classes, pred_masks=masks
        )
        evaluator.process([item], [{"instances": found}])
    return flat_metrics(evaluator.evaluate())


def test_a_detector_that_finds_everything_has_box_ap_100(cfg: CfgNode) -> None:
    metrics = evaluate(cfg, perfect=True)
    assert metrics["bbox/AP"] == pytest.approx(100)
    assert 0 < (metrics["segm/AP"] or 0) < 100  # a box is no triangle


def test_a_detector_that_finds_nothing_has_ap_zero(cfg: CfgNode) -> None:
    metrics = evaluate(cfg, perfect=False)
    assert [metrics[f"{task}/{name}"] for task in ("bbox", "segm") for name in ("AP", "AP50", "AP75")] == [0] * 6


def test_without_masks_there_is_no_mask_ap(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_ON = False
    assert not [name for name in evaluate(cfg, perfect=False) if name.startswith("segm")]


def test_metrics_are_flat_and_finite() -> None:
    results = {"bbox": {"AP": 40.5, "APl": math.nan}, "set": {"segm": {"AP": 1}}}
    assert flat_metrics(results) == {"bbox/AP": 40.5, "bbox/APl": None, "set/segm/AP": 1.0}
