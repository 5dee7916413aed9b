"""The picture that compares detectors: a column each, and drawn objects where there are any."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from pycocotools.coco import COCO

from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.visualize import draw_comparison


def test_columns_show_what_was_found(
    shapes: Path, small_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector that repeats the ground truth draws it again; one that is never sure draws only the images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    register_datasets(small_cfg)
    coco = COCO(str(shapes / "shapes/annotations/instances_val.json"))
    perfect = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "segmentation": coco.annToRLE(a), "score": 0.9}
        for a in coco.anns.values()
    ]
    for row in perfect:
        row["segmentation"]["counts"] = row["segmentation"]["counts"].decode()
    weak = [{**row, "score": 0.1} for row in perfect]
    for name, rows in (("perfect", perfect), ("weak", weak)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    results = {name: tmp_path / f"{name}.json" for name in ("perfect", "weak")}
    draw_comparison("shapes_val", results, tmp_path / "out.png", images=2)

    picture = cv2.imread(str(tmp_path / "out.png")).astype(int)
    columns = np.split(picture, 3, axis=1)  # ground truth, perfect, weak; the top strip holds the title
    plain = cv2.imread(str(shapes / "shapes/val/000001.jpg"))
    height, width = columns[2].shape[0] // 2 - 28, columns[2].shape[1]
    plain = cv2.resize(plain, (width, height)).astype(int)
    changed = [np.abs(column[28 : 28 + height] - plain).max(axis=2) > 60 for column in columns]
    assert changed[2].mean() < 0.02
    assert changed[0].mean() > 2 * changed[2].mean()
    assert changed[1].mean() > 2 * changed[2].mean()
