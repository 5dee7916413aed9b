"""train_net from end to end on tiny shapes, in its own process as a user runs it, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robust_backbones.detection.checkpoint import newest_checkpoint
from robust_backbones.runs.record import RunRecord
from tests.conftest import ROOT
from tests.detection.conftest import RESNET18, SHAPES_CONFIG

Maker = Callable[[str], Path]
TINY = ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 1, "SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 2]
TINY += ["TEST.EXPECTED_RESULTS", "[]"]


def train_net(data: Path, *arguments: object, status: int = 0, stop: Path | None = None) -> tuple[str, str]:
    """What the command prints; once ``stop`` exists, all its processes get SIGTERM, as from a scheduler."""
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(SHAPES_CONFIG)]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    while stop is not None and not stop.exists() and process.poll() is None:
        time.sleep(0.01)
    if stop is not None:
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == status, out[-3000:] + err[-3000:]
    return out, err


def test_train_stop_resume_evaluate(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    overrides = [*RESNET18, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 30]
    out, _ = train_net(shapes, *overrides, "OUTPUT_DIR", unbroken)
    assert "backbone: 100 of 100 tensors filled" in out
    assert "batch 2 (processes: 1, images each: 2), learning rate 0.01, 30 iterations, seed 0" in out
    assert str(unbroken) in out.splitlines()[-1]
    record = RunRecord.read(unbroken / "record.json")
    assert record.task == "segmentation"
    assert record.backbone["arch"] == "resnet18"
    assert record.dataset == "shapes_val"
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= record.metrics.keys()

    _, err = train_net(shapes, *overrides, "OUTPUT_DIR", run, stop=run / "model_0000003.pth", status=75)
    assert_refused(err, "asked to stop after iteration", "--resume")
    assert not (run / "record.json").exists()
    # Neither this run nor another starts over it; --resume continues it.
    assert_refused(train_net(shapes, *overrides, "OUTPUT_DIR", run, status=2)[1], "--resume")
    other = [*overrides, "OUTPUT_DIR", run, "SOLVER.BASE_LR", 0.5]
    assert_refused(train_net(shapes, "--resume", *other, status=2)[1], "SOLVER.BASE_LR is 0.01 there and 0.5 here")
    (run / "last_checkpoint").unlink()  # the newest file is found without it
    newest = newest_checkpoint(run)
    assert newest is not None
    content = torch.load(newest, weights_only=True)
    content["trainer"]["seconds"] += 1000
    torch.save(content, newest)
    train_net(shapes, "--resume", *overrides, "OUTPUT_DIR", run)
    assert RunRecord.read(run / "record.json").seconds > 1000  # those before the stop count
    ours, theirs = (torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in (run, unbroken))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert RunRecord.read(run / "record.json").metrics == record.metrics
    out, _ = train_net(shapes, "--resume", *overrides, "OUTPUT_DIR", run)
    assert "finished before" in out.splitlines()[-1]

    # The final file, evaluated alone and by COCO's own code, gives what the end of training gave.
    evaluation = [*overrides, "MODEL.WEIGHTS", run / "model_final.pth", "OUTPUT_DIR", tmp_path / "evaluation"]
    out, _ = train_net(shapes, "--eval-only", "--reference-eval", *evaluation)
    assert "computed by pycocotools" in out
    metrics = RunRecord.read(tmp_path / "evaluation/eval_record.json").metrics
    assert metrics == pytest.approx(record.metrics, abs=1e-9, nan_ok=True)
    _, err = train_net(
        shapes, "--eval-only", *evaluation, "TEST.EXPECTED_RESULTS", '[["bbox", "AP", 99.0, 0.5]]', status=1
    )
    assert_refused(err, "TEST.EXPECTED_RESULTS says 99.0 ± 0.5")


def test_two_processes_stop_together(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*RESNET18, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 60, "OUTPUT_DIR", run]
    _, err = train_net(shapes, "--num-gpus", 2, *overrides, stop=run / "model_0000003.pth", status=75)
    assert_refused(err, "asked to stop after iteration")
    newest = newest_checkpoint(run)
    assert newest is not None
    states = torch.load(newest, weights_only=True)["trainer"]["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0]["now"]["torch"], states[1]["now"]["torch"])


def assert_refused(stderr: str, *words: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in errors[0]


def test_a_raw_torchvision_file_is_refused(shapes: Path, torchvision_file: Maker, tmp_path: Path) -> None:
    overrides = [*RESNET18, *TINY, "MODEL.WEIGHTS", torchvision_file("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(train_net(shapes, *overrides, status=2)[1], "robust-backbones convert")
    assert not (tmp_path / "run").exists()


def test_an_annotation_without_its_image_is_refused(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    shutil.copytree(shapes / "shapes", tmp_path / "shapes")
    (tmp_path / "shapes/val/000002.jpg").unlink()
    overrides = [*RESNET18, "MODEL.WEIGHTS", converted("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(train_net(tmp_path, *overrides, status=2)[1], "000002.jpg")
    assert not (tmp_path / "run").exists()


def test_what_the_configuration_gets_wrong_is_refused(
    run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, converted: Maker
) -> None:
    def refused(*arguments: object) -> str:
        status, _, err = run_tool("train", *arguments)
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
    assert_refused(train_net(shapes, *overrides, status=2)[1], "has 4 classes", "MODEL.ROI_HEADS.NUM_CLASSES 4")
