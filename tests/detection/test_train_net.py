"""train_net from end to end on tiny shapes, in its own process as a user runs it, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from robust_backbones.records import RunRecord
from tests.conftest import ROOT
from tests.detection.conftest import RESNET18, SHAPES_CONFIG

Maker = Callable[[str], Path]
TINY = ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 2]


def train_net(data: Path, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(SHAPES_CONFIG)]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def test_train_resume_evaluate(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    output = tmp_path / "run"
    overrides = [*RESNET18, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "OUTPUT_DIR", output]
    result = train_net(shapes, *overrides, "SOLVER.MAX_ITER", 3)
    assert "backbone: 100 of 100 tensors filled" in result.stdout
    assert str(output) in result.stdout.splitlines()[-1]
    record = RunRecord.read(output / "record.json")
    assert record.task == "segmentation"
    assert record.backbone["arch"] == "resnet18"
    assert record.dataset == "shapes_val"
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= record.metrics.keys()

    # Another run never starts over this one; --resume goes on with it.
    refused = train_net(shapes, *overrides, "SOLVER.MAX_ITER", 5, status=2)
    assert "holds another run" in refused.stderr.splitlines()[-1]
    train_net(shapes, "--resume", *overrides, "SOLVER.MAX_ITER", 5)
    iterations = [json.loads(line)["iteration"] for line in (output / "metrics.json").read_text().splitlines()]
    assert iterations == sorted(iterations)
    assert iterations[-1] == 5  # Detectron2 writes the last evaluation under the number of iterations
    record = RunRecord.read(output / "record.json")
    assert record.config["SOLVER"]["MAX_ITER"] == 5

    # The final file, evaluated alone, gives what the end of training gave.
    overrides[-3:] = [output / "model_final.pth", "OUTPUT_DIR", tmp_path / "evaluation"]
    train_net(shapes, "--eval-only", *overrides)
    assert RunRecord.read(tmp_path / "evaluation/eval_record.json").metrics == pytest.approx(
        record.metrics, nan_ok=True
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


def test_a_raw_torchvision_file_is_refused(shapes: Path, torchvision_file: Maker, tmp_path: Path) -> None:
    overrides = [*RESNET18, *TINY, "MODEL.WEIGHTS", torchvision_file("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(train_net(shapes, *overrides, status=2), "tools/convert_backbone.py")
    assert not (tmp_path / "run").exists()


def test_an_annotation_without_its_image_is_refused(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    shutil.copytree(shapes / "shapes", tmp_path / "shapes")
    (tmp_path / "shapes/val/000002.jpg").unlink()
    overrides = [*RESNET18, "MODEL.WEIGHTS", converted("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(train_net(tmp_path, *overrides, status=2), "000002.jpg")
    assert not (tmp_path / "run").exists()


def test_what_the_configuration_gets_wrong_is_refused(
    run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, converted: Maker
) -> None:
    def refused(*arguments: object) -> str:
        status, _, err = run_tool("train_net", *arguments)
        assert status == 2
        assert len(err.strip().splitlines()) == 1
        return err

    config = ["--config-file", SHAPES_CONFIG]
    output = ["OUTPUT_DIR", tmp_path / "run"]
    assert "--config-file" in refused()
    assert "none.yaml" in refused("--config-file", tmp_path / "none.yaml")
    assert "MODEL.MASK_ON" in refused(*config, "MODEL.MASKON", "True")
    assert "KEY VALUE" in refused(*config, "MODEL.WEIGHTS")
    assert "DETECTRON2_DATASETS" in refused(*config, *output)  # not set here: ./datasets does not exist
    assert "unknown data set" in refused(*config, "DATASETS.TEST", "('coco_2077',)", "DATASETS.TRAIN", "()", *output)
    assert not (tmp_path / "run").exists()


def test_the_number_of_classes_is_held_against_the_data(shapes: Path, tmp_path: Path) -> None:
    overrides = ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(train_net(shapes, *overrides, status=2), "has 4 classes", "MODEL.ROI_HEADS.NUM_CLASSES 4")
