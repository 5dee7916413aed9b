"""The report's pictures: what the standard and the best robust detector find in the same test images."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model

from robust_backbones.data.synthetic import CLASSES
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config
from robust_backbones.detection.visualize import TITLE_HEIGHT, _in_order_of, draw_side_by_side, read_rgb
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import SHAPES_CONFIG, SMALL


@pytest.fixture(scope="module")
def study(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two detectors that were never trained: the robust one finds many things, the standard none."""
    root = tmp_path_factory.mktemp("study")
    for name, threat_model, scale in (("standard", "L2:0", 0.0), ("robust", "L2:3", 60.0), ("worse", "L2:5", 60.0)):
        cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", "SEED", 0])
        torch.manual_seed(0)
        checkpointer = BackboneCheckpointer(build_model(cfg), str(root / name), cfg=cfg)
        checkpointer.load(str(converted("resnet18")))
        checkpointer.model.roi_heads.box_predictor.cls_score.weight.data.mul_(scale)
        if name != "worse":  # whose weights are not there
            categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
            checkpointer.save("model_final", categories=categories, iteration=9)
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.yaml").write_text(cfg.dump())
        metrics = {"segm/AP": {"standard": 1.0, "robust": 3.0, "worse": 2.0}[name]}
        config = yaml.safe_load(cfg.dump())
        backbone = {"arch": "resnet18", "num_classes": 10}
        record = RunRecord(name, "segmentation", backbone, threat_model, "shapes_val", metrics, 0, config, 1.0)
        record.write(root / name / "record.json")
    return root


@pytest.mark.slow
def test_the_standard_and_the_best_robust_detector(
    study: Path,
    shapes: Path,
    tmp_path: Path,
    run_tool: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    status, _, err = run_tool("report", study, "--output", tmp_path, "--pictures", 2)
    assert status == 0, err
    (file,) = (tmp_path / "figures").glob("*_detections.jpg")
    picture = read_rgb(file).astype(int)
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    assert (width, height) == (400, 400 + TITLE_HEIGHT)  # the scenes are square
    truth, standard, robust = np.split(picture[TITLE_HEIGHT:height], 3, axis=1)
    # The panels show the same photograph; the standard detector's has nothing drawn on it, the others have.
    assert np.abs(truth - standard).mean() > 1
    assert np.abs(robust - standard).mean() > 1
    html = (tmp_path / "report.html").read_text()
    (source,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert base64.b64decode(source) == file.read_bytes()
    assert "L2:0 seed 0, L2:3 seed 0" in html
    assert "Single images prove nothing" in html


def test_objects_are_drawn_by_their_names_or_not_at_all() -> None:
    objects = [{"category_id": 0}, {"category_id": 1}]
    drawn = _in_order_of(["cat", "dog", "cow"], ["cow", "cat"], objects)
    assert [item["category_id"] for item in drawn] == [2, 0]
    with pytest.raises(InputError, match="a detector of 'sheep' cannot be drawn"):
        _in_order_of(["cat", "dog"], ["dog", "sheep"], objects)
    assert _in_order_of(["cat", "dog"], ["class 0", "class 1"], objects) == objects


def test_weights_that_are_not_there_are_named(study: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    with pytest.raises(InputError, match=r"no model_final\.pth in"):
        draw_side_by_side({"worse": study / "worse"}, study / "x.jpg", images=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(study))
    with pytest.raises(InputError, match="shapes_val lacks"):
        draw_side_by_side({"robust": study / "robust"}, study / "x.jpg", images=1)
    assert not (study / "x.jpg").exists()


def test_a_report_without_the_weights_says_so(study: Path, tmp_path: Path, run_tool: Callable[..., Any]) -> None:
    """As after `sweep unpack`, which brings the records of what is done and no weights."""
    options = ("--output", tmp_path / "report", "--pictures", 1)
    status, _, err = run_tool("report", study / "standard", study / "worse", *options)
    assert status == 2
    assert f"{study / 'worse'} has no model_final.pth to draw with, as after `sweep unpack`" in err


def test_where_nothing_can_be_drawn_it_says_so(
    study: Path,
    shapes: Path,
    tmp_path: Path,
    run_tool: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    status, out, _ = run_tool("report", study / "standard", "--output", tmp_path / "report", "--pictures", 1)
    assert status == 0
    assert "no pictures: " in out
    with pytest.raises(InputError, match="no annotated image"):
        draw_side_by_side({"standard": study / "standard"}, tmp_path / "picture.jpg", images=0)
