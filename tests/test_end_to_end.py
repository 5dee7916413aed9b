"""The whole path: on real images in a short form, and `make demo` in full."""

import importlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from robust_backbones.runs.record import RunRecord
from tests.conftest import call_verb, start_fork

pytest.importorskip("detectron2", reason="Detectron2 is not installed: tools/install_detectron2.py")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin

RunTool = Callable[..., tuple[int, str, str]]


def train(data: Path, output: Path, *arguments: object) -> str:
    """What the command prints in a fork, where Detectron2's own data sets are those of the folder ``data``."""

    def run() -> None:
        os.environ["DETECTRON2_DATASETS"] = str(data)
        DatasetCatalog.clear()
        MetadataCatalog.clear()
        importlib.reload(builtin)  # it looks for them when it is imported
        call_verb("train", *arguments)

    process = start_fork(run, output)
    process.join()
    assert process.exitcode == 0, "".join((output / name).read_text()[-3000:] for name in ("out", "err"))
    return (output / "out").read_text()


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own exit status says whether both detectors have the expected AP50; a second run repeats nothing."""
    monkeypatch.setenv("DETECTRON2_DATASETS", "")  # the demo sets it
    status, out, err = run_tool("demo", "--output", tmp_path / "demo")
    assert status == 0, err
    assert "| L2:0 |" in out
    assert "| L2:0.5 |" in out
    assert (tmp_path / "demo/detections.jpg").stat().st_size > 10_000
    for name in ("standard", "robust"):
        record = RunRecord.read(tmp_path / "demo" / name / "detector/record.json")
        assert (record.metrics["bbox/AP50"] or 0) > 60
        assert (record.metrics["segm/AP50"] or 0) > 60
    status, out, err = run_tool("demo", "--output", tmp_path / "demo")
    assert (status, "$ robust-backbones" in out, "| L2:0.5 |" in out) == (0, False, True), err


def extract(archive: Path, folder: Path, classes: int, counts: dict[str, int]) -> None:
    """The first images of the first classes, ``counts`` for each part; a part ``test`` becomes ``val``."""
    taken: dict[str, Counter[str]] = {part: Counter() for part in counts}
    with tarfile.open(archive) as packed:
        for member in packed:
            part, name, *_ = Path(member.name).parts[-3:] if member.isfile() else ("", "")
            if part not in taken or (name not in taken[part] and len(taken[part]) == classes):
                continue
            taken[part][name] += 1
            if taken[part][name] <= counts[part]:
                member.name = f"{part.replace('test', 'val')}/{name}/{Path(member.name).name}"
                packed.extract(member, folder, filter="data")


def a_little(data: Path, root: Path, count: int) -> Path:
    """The first ``count`` images of each part of COCO and of VOC2007, in a folder of Detectron2's layout."""
    for part in ("train2017", "val2017"):
        content = json.loads((data / f"coco/annotations/instances_{part}.json").read_text())
        content["images"] = content["images"][:count]
        shown = {image["id"] for image in content["images"]}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in shown]
        (root / "coco/annotations").mkdir(parents=True, exist_ok=True)
        (root / f"coco/annotations/instances_{part}.json").write_text(json.dumps(content))
        (root / "coco" / part).symlink_to(data / "coco" / part)
    lists = Path("VOC2007/ImageSets/Main")
    (root / lists).mkdir(parents=True)
    for part in ("trainval.txt", "test.txt"):
        lines = (data / lists / part).read_text().splitlines()[:count]
        (root / lists / part).write_text("".join(f"{line}\n" for line in lines))
    for folder in ("Annotations", "JPEGImages"):
        (root / "VOC2007" / folder).symlink_to(data / "VOC2007" / folder)
    return root


@pytest.mark.slow
@pytest.mark.real_data
def test_real_images_from_pixels_to_average_precision(real_data: Path, tmp_path: Path, run_tool: RunTool) -> None:
    """Twelve images of five classes of Tiny-ImageNet, then a little of VOC2007 and COCO, by the project's commands."""
    data = tmp_path / "tiny-imagenet-5"
    extract(real_data / "tiny_imagenet_100.tar.gz", data, 5, {"train": 12, "val": 6})
    for name, threat_model in (("standard", "L2:0"), ("robust", "L2:3")):
        recipe = f"--threat-model {threat_model} --eval-threat-model L2:0.5 --epochs 1 --batch-size 20 --lr 0.01"
        size = "--arch resnet18 --image-size 64 --val-resize 64 --precision bf16 --attack.steps 1 --eval-attack.steps 1"
        output = ("--output", tmp_path / name)
        status, _, err = run_tool("pretrain", "--data", data, *output, *recipe.split(), *size.split())
        assert status == 0, err
        record = RunRecord.read(tmp_path / name / "record.json")
        assert record.threat_model == threat_model
        assert 0 <= (record.metrics["robust_accuracy"] or 0) <= (record.metrics["clean_accuracy"] or 0) <= 100
        status, out, err = run_tool("convert", tmp_path / name / "checkpoint.pt", tmp_path / f"{name}.pkl")
        assert (status, "features are equal" in out) == (0, True), err

    detection = a_little(real_data / "detectron2", tmp_path / "detection", 8)
    for config, backbone, task in (
        ("faster_rcnn_R_50_FPN_voc_instant", "standard", "bbox"),
        ("mask_rcnn_R_50_FPN_coco_instant", "robust", "segm"),
    ):
        command: list[object] = ["--config-file", f"quick/{config}.yaml"]
        command += ["--config-file", "architectures/resnet18.yaml"]
        command += ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", 2]
        command += ["INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", 128, "TEST.DETECTIONS_PER_IMAGE", 10]
        command += ["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 128, "TEST.VISUALIZE", 0]
        command += ["MODEL.WEIGHTS", tmp_path / f"{backbone}.pkl", "OUTPUT_DIR", tmp_path / config]
        out = train(detection, tmp_path / f"{config} says", *command)
        assert "backbone: 100 of 100 tensors filled" in out
        record = RunRecord.read(tmp_path / config / "record.json")
        assert record.threat_model == ("L2:3" if backbone == "robust" else "L2:0")
        assert {f"{task}/AP", f"{task}/AP50", f"{task}/AP75"} <= record.metrics.keys()


@pytest.mark.slow
@pytest.mark.real_data
def test_real_images_with_and_without_an_adversary(real_data: Path, tmp_path: Path, run_tool: RunTool) -> None:
    """A little of CIFAR-10 through the benchmark of the README and the evaluation, as class folders and as shards."""
    data = tmp_path / "cifar10"
    extract(real_data / "cifar10.tar.gz", data, 10, {"train": 3, "test": 2})
    options = ("--data", data, "--output", tmp_path / "runs", "--epochs", 1, "--batch-size", 16)
    status, out, err = run_tool("benchmark", "robustness", *options)
    assert status == 0, err
    assert "| robust | Linf:8/255 | 1 |" in out
    assert (tmp_path / "runs/table.md").read_text() in out
    assert (tmp_path / "runs/curves.png").stat().st_size > 5_000

    classes = sorted(path.name for path in (data / "val").iterdir())
    assert len(classes) == 10
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as archive:
        for index, path in enumerate(sorted((data / "val").rglob("*.jpg"))):
            (tmp_path / "label").write_text(str(classes.index(path.parent.name)))
            archive.add(path, f"{index:04}.jpg")
            archive.add(tmp_path / "label", f"{index:04}.cls")
    attack = ["--threat-model", "Linf:8/255", "--image-size", 32, "--val-resize", 32, "--limit", 10]
    attack += ["--apgd-steps", 5, "--square-queries", 20]
    outcomes = []
    for folder in ("cifar10/val", "shards"):
        output = tmp_path / f"evaluation_{folder.partition('/')[0]}"
        checkpoint = tmp_path / "runs/robust/checkpoint.pt"
        where = ("--data", tmp_path / folder, "--output", output)
        status, _, err = run_tool("evaluate", "classifier", checkpoint, *where, *attack)
        assert status == 0, err
        outcomes.append(RunRecord.read(output / "record.json").metrics)
    assert outcomes[0] == outcomes[1]
    assert 0 <= outcomes[0]["autoattack_accuracy"] <= outcomes[0]["clean_accuracy"] <= 100
