"""train_net from end to end on tiny shapes, in its own process as a user runs it, and what it refuses."""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

from robust_backbones.checkpoint.format import sha256
from robust_backbones.detection.checkpoint import newest_checkpoint
from robust_backbones.detection.collapse import NOTHING
from robust_backbones.runs.folders import own_folder
from robust_backbones.runs.record import RunRecord
from tests.conftest import call_verb, start_fork, start_forks
from tests.detection.conftest import SHAPES_CONFIG, SMALL

Maker = Callable[[str], Path]
TINY = ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 1, "SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 2]
TINY += ["TEST.EXPECTED_RESULTS", "[]"]


def train_net(data: Path, *arguments: object, status: int = 0, stop: Path | None = None) -> tuple[str, str]:
    """What the command prints; once ``stop`` exists, all its processes get SIGTERM, as from a scheduler."""

    def train() -> None:
        os.environ["DETECTRON2_DATASETS"] = str(data)
        torch.multiprocessing.start_processes = start_forks
        call_verb("train", "--config-file", SHAPES_CONFIG, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        process = start_fork(train, Path(folder))
        while stop is not None and not stop.exists() and process.is_alive():
            time.sleep(0.01)
        if stop is not None:
            os.killpg(process.pid, signal.SIGTERM)
        process.join(1200)
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    assert process.exitcode == status, out[-3000:] + err[-3000:]
    return out, err


@pytest.fixture
def run(
    run_tool: Callable[..., tuple[int, str, str]], shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """The same command in this process."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))

    def train(*arguments: object, status: int = 0) -> tuple[str, str]:
        found, out, err = run_tool("train", "--config-file", SHAPES_CONFIG, *arguments)
        assert found == status, err
        return out, err

    return train


def test_train_and_evaluate(run: Callable[..., tuple[str, str]], converted: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    overrides += ["OUTPUT_DIR", folder]
    with own_folder(folder):
        assert_refused(run(*overrides, status=2)[1], f"is in use by process {os.getpid()} on")
    folder.mkdir()
    (folder / "config.yaml").write_text("SOLVER: {BASE_LR: 0.5}")  # of a start that failed before its first step
    out, _ = run(*overrides)
    log = (folder / "log.txt").read_text()
    assert "backbone: 100 of 100 tensors filled" in log
    assert "batch 2 (processes: 1, images each: 2), learning rate 0.01, 2 iterations, seed 0" in log
    assert str(folder) in out.splitlines()[-1]
    record = RunRecord.read(folder / "record.json")
    assert (record.task, record.backbone["arch"], record.dataset) == ("segmentation", "resnet18", "shapes_val")
    assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= record.metrics.keys()
    # Neither this run nor another starts over it.
    assert_refused(run(*overrides, status=2)[1], "--resume")
    assert_refused(
        run("--resume", *overrides, "SOLVER.BASE_LR", 0.5, status=2)[1], "SOLVER.BASE_LR is 0.01 there and 0.5 here"
    )
    assert "finished before" in run("--resume", *overrides)[0].splitlines()[-1]

    # The final file, evaluated alone and by COCO's own code, gives what the end of training gave.
    evaluation = [*overrides, "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path / "evaluation"]
    expected = ["TEST.EXPECTED_RESULTS", '[["bbox", "AP", 99.0, 0.5]]']
    _, err = run("--eval-only", "--reference-eval", *evaluation, *expected, status=1)
    assert_refused(err, "TEST.EXPECTED_RESULTS says 99.0 ± 0.5")
    assert "computed by pycocotools" in (tmp_path / "evaluation/log.txt").read_text()
    metrics = RunRecord.read(tmp_path / "evaluation/eval_record.json").metrics
    assert metrics == pytest.approx(record.metrics, abs=1e-9, nan_ok=True)


def test_a_detector_that_finds_nothing_is_told(
    run: Callable[..., tuple[str, str]], converted: Maker, tmp_path: Path
) -> None:
    """In the log, at the end and whenever it is evaluated; nothing fails."""
    folder = tmp_path / "run"
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    overrides += ["OUTPUT_DIR", folder]
    blind = [*overrides, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99]
    told = "no detection above SCORE_THRESH_TEST on the 6 images of shapes_val: the detector was hardly trained"

    def warnings(*arguments: object) -> list[str]:
        return [line for line in run(*arguments)[1].splitlines() if line.startswith("warning: ")]

    (warning,) = warnings(*blind, "DATASETS.TEST", ("shapes_val", "shapes_val"))  # one set, named twice
    assert told in warning
    assert "too high; train longer, lower SOLVER.BASE_LR" in warning  # its loss was never far above its start
    assert told in (folder / "log.txt").read_text()
    assert RunRecord.read(folder / "record.json").data_warnings == {"shapes_val": {NOTHING: 6}}
    assert warnings("--resume", *blind, "DATASETS.TEST", ("shapes_val", "shapes_val")) == [warning]

    # Loss and scores of a collapsed one.
    losses = [{"iteration": number, "total_loss": loss} for number, loss in enumerate((2.0, 31.4, 1.0))]
    (folder / "metrics.json").write_text("".join(f"{json.dumps(row)}\n" for row in losses))
    content = torch.load(folder / "model_final.pth", weights_only=True)
    content["model"]["roi_heads.box_predictor.cls_score.weight"].zero_()
    torch.save(content, folder / "collapsed.pth")
    evaluation = ["MODEL.WEIGHTS", folder / "collapsed.pth", "OUTPUT_DIR", tmp_path / "evaluation"]
    (warning,) = warnings("--eval-only", *overrides, *evaluation)
    assert "detections on shapes_val have the same score" in warning
    assert "(its loss was 31.4 at iteration 1, and 2 at first); train longer" in warning
    evaluation = ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path / "evaluation"]
    assert not warnings("--eval-only", *overrides, *evaluation)


def write_voc(shapes: Path, folder: Path, part: str) -> None:
    """The shapes in VOC's layout: names with spaces, PNG images, a list of two columns."""
    content = json.loads((shapes / f"annotations/instances_{part}.json").read_text())
    names = {row["id"]: row["name"] for row in content["categories"]}
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    lines = []
    for image in content["images"]:
        name = f"{part} photo {image['id']}"
        lines.append(f"{name} 1\n")
        Image.open(shapes / part / image["file_name"]).save(folder / f"JPEGImages/{name}.png")
        objects = ""
        for row in content["annotations"]:
            if row["image_id"] == image["id"]:
                x, y, width, height = row["bbox"]
                corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True)
                box = "".join(f"<{side}>{value!r}</{side}>" for side, value in corners)
                objects += f"<object><name>{names[row['category_id']]}</name><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / f"ImageSets/Main/{part}.txt").write_text("".join(lines))


@pytest.mark.slow
def test_own_data_in_one_line(
    run: Callable[..., tuple[str, str]], shapes: Path, converted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's format and VOC's, absolute and relative to DETECTRON2_DATASETS: the same images and boxes train alike."""
    for part in ("train", "val"):
        write_voc(shapes / "shapes", tmp_path / "voc", part)
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    overrides += ["MODEL.MASK_ON", False]
    coco = ["--train", "mine=shapes/annotations/instances_train.json:shapes/train"]
    coco += ["--test", f"v={shapes}/shapes/annotations/instances_val.json:{shapes}/shapes/val"]
    voc = ["--train", f"mine={tmp_path}/voc:train", "--test", f"v={tmp_path}/voc:val"]
    weights, boxes = [], []
    for kind, sets in (("coco", coco), ("voc", voc)):
        run(*sets, *overrides, "OUTPUT_DIR", tmp_path / f"run_{kind}")
        record = RunRecord.read(tmp_path / f"run_{kind}/record.json")
        assert record.dataset == "v"
        weights.append(torch.load(tmp_path / f"run_{kind}/model_final.pth", weights_only=True)["model"])
        items = sorted(DatasetCatalog.get("mine"), key=lambda item: int(str(item["image_id"]).split()[-1]))
        things = [thing for item in items for thing in item["annotations"]]
        corners = [BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYXY_ABS) for thing in things]
        boxes.append(np.c_[np.array([thing["category_id"] for thing in things]), np.array(corners)])
    np.testing.assert_allclose(boxes[0], boxes[1], rtol=1e-6)  # Detectron2 adds width and height in float32
    assert record.metrics.keys() >= {"bbox/AP", "bbox/AP50", "bbox/AP-circle"}
    # JPEG and PNG hold the same pixels, and the images come in the same order.
    assert all(torch.allclose(tensor, weights[1][name], rtol=1e-3, atol=1e-5) for name, tensor in weights[0].items())
    run("--train", f"mine={tmp_path}/voc:train", *overrides, "TEST.EVAL_PERIOD", 1, "OUTPUT_DIR", tmp_path / "untested")
    record = RunRecord.read(tmp_path / "untested/record.json")
    assert (record.dataset, record.metrics) == ("mine", {})
    untested = torch.load(tmp_path / "untested/model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, untested[name]) for name, tensor in weights[1].items())
    # Relative paths start in the working folder too, and the number of classes in a configuration is not the data's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seven.yaml").write_text("MODEL:\n  ROI_HEADS:\n    NUM_CLASSES: 7\nVERSION: 2\n")
    run("--config-file", "seven.yaml", "--train", "mine=voc:train", *overrides, "OUTPUT_DIR", "elsewhere")
    assert RunRecord.read(Path("elsewhere/record.json")).config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4
    for wrong in ("mine=train.json", "=train.json:images", "mine=:images"):
        assert_refused(run("--train", wrong, *overrides, "OUTPUT_DIR", tmp_path / "no", status=2)[1], "NAME=")
    _, err = run("--train", f"mine={tmp_path}/voc:train", "--classes", "circle,cross", *overrides, status=2)
    assert_refused(err, "it has to be one of the classes, circle, cross")


@pytest.mark.slow
def test_a_stopped_run_resumes_as_the_unbroken_one(
    run: Callable[..., tuple[str, str]], shapes: Path, converted: Maker, tmp_path: Path
) -> None:
    stopped, unbroken = tmp_path / "run", tmp_path / "unbroken"
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 12]
    run(*overrides, "OUTPUT_DIR", unbroken)
    _, err = train_net(shapes, *overrides, "OUTPUT_DIR", stopped, stop=stopped / "model_0000001.pth", status=75)
    assert_refused(err, "asked to stop after iteration", "--resume")
    assert not (stopped / "record.json").exists()
    (stopped / "last_checkpoint").unlink()  # the newest file is found without it
    newest = newest_checkpoint(stopped)
    assert newest is not None
    content = torch.load(newest, weights_only=True)
    content["trainer"]["seconds"] = 1000.0  # as in older checkpoints
    torch.save(content, newest)
    run("--resume", *overrides, "OUTPUT_DIR", stopped)
    record, held = (RunRecord.read(folder / "record.json") for folder in (stopped, unbroken))
    assert record.seconds > 1000  # those before the stop count
    assert sha256(stopped / "model_final.pth") == sha256(unbroken / "model_final.pth")
    assert record.metrics == held.metrics


@pytest.mark.slow
def test_two_processes_stop_together(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 60, "OUTPUT_DIR", run]
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


def test_a_raw_torchvision_file_is_refused(
    run: Callable[..., tuple[str, str]], torchvision_file: Maker, tmp_path: Path
) -> None:
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", torchvision_file("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(run(*overrides, status=2)[1], "robust-backbones convert")
    assert not (tmp_path / "run").exists()


def test_an_annotation_without_its_image_is_refused(
    run: Callable[..., tuple[str, str]], shapes: Path, converted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shapes / "shapes", tmp_path / "shapes")
    (tmp_path / "shapes/val/000002.jpg").unlink()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    overrides = [*SMALL, "MODEL.WEIGHTS", converted("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(run(*overrides, status=2)[1], "000002.jpg")
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
    for late in (["--eval-only"], ["--num-gpus", 2]):
        assert f"{late[0]} comes after KEY VALUE" in refused(*config, "MODEL.WEIGHTS", "x.pkl", *late)
    assert "DETECTRON2_DATASETS" in refused(*config, *output)  # not set here: ./datasets does not exist
    assert "unknown data set" in refused(*config, "DATASETS.TEST", "('coco_2077',)", "DATASETS.TRAIN", "()", *output)
    assert "leave out --resume" in refused(*config, "--eval-only", "--resume", *output)
    assert "VOC's format" in refused(*config, "--classes", "circle,square", *output)
    compiled = ["MODEL.COMPILE", "True", "MODEL.FAST_STEP", "True", "INPUT.MASK_FORMAT", "bitmask"]
    assert "pays on GPUs only" in refused(*config, *compiled, "MODEL.DEVICE", "cpu", *output)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["MODEL.META_ARCHITECTURE", "Nothing"], "No object named 'Nothing'"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "x"], "Unknown pooler type: x"),
        (["MODEL.FPN.NORM", "x"], "'x'"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[]"], "cannot be empty"),
        (["SOLVER.MOMENTUM", -1.0], "momentum"),
        (["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "x"], "AssertionError"),
        (["DATALOADER.SAMPLER_TRAIN", "x"], "Unknown training sampler: x"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN"),
    ],
)
def test_what_detectron2_does_not_know_is_one_sentence(
    run: Callable[..., tuple[str, str]], converted: Maker, tmp_path: Path, overrides: list[object], words: str
) -> None:
    output = ["MODEL.WEIGHTS", converted("resnet18"), "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(run(*SMALL, *TINY, *overrides, *output, status=2)[1], words)


def test_the_number_of_classes_is_held_against_the_data(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    overrides = ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "OUTPUT_DIR", tmp_path / "run"]
    assert_refused(run(*overrides, status=2)[1], "has 4 classes", "MODEL.ROI_HEADS.NUM_CLASSES 4")
