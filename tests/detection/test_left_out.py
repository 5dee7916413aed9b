"""Images that cannot be read: named and refused, or left out as if the set had never held them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog

from robust_backbones.detection.config import load_config
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.evaluators import build_evaluator
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_train_net import TINY, Maker, write_voc

RunTool = Callable[..., tuple[int, str, str]]
BROKEN = {"train": ["000002.jpg", "000005.jpg"], "val": ["000003.jpg"]}
OPTION = "--skip-unreadable"


def damage(path: Path) -> None:
    """Its header stays, and its last bytes: only decoding finds the hole."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".png":
        content[len(content) // 2] ^= 0xFF
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)


@pytest.fixture(scope="module")
def sets(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shapes with damaged images, and without them."""
    broken, rest = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("rest")
    for root in (broken, rest):
        shutil.copytree(shapes / "shapes", root / "shapes")
    for part, names in BROKEN.items():
        for name in names:
            damage(broken / "shapes" / part / name)
        file = rest / f"shapes/annotations/instances_{part}.json"
        content = json.loads(file.read_text())
        gone = {row["id"] for row in content["images"] if row["file_name"] in names}
        assert len(gone) == len(names)
        content["images"] = [row for row in content["images"] if row["id"] not in gone]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in gone]
        file.write_text(json.dumps(content))
    return broken, rest


def test_the_run_is_that_of_the_other_images(
    sets: tuple[Path, Path], converted: Maker, tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    overrides += ["DATALOADER.NUM_WORKERS", 0]
    tensors, metrics = [], []
    for root, name in zip(sets, ("broken", "rest"), strict=True):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        arguments = ["--config-file", SHAPES_CONFIG, *overrides, "OUTPUT_DIR", tmp_path / name]
        if name == "broken":
            status, _, err = run_tool("train", *arguments)
            assert status == 2
            assert OPTION in err
            assert "train/000002.jpg" in err
            assert not (tmp_path / name).exists()
        status, _, err = run_tool("train", OPTION, *arguments)
        assert status == 0, err
        record = RunRecord.read(tmp_path / name / "record.json")
        metrics.append(record.metrics)
        skipped = [("shapes_train", "000002.jpg"), ("shapes_train", "000005.jpg"), ("shapes_val", "000003.jpg")]
        listed = [(dataset, file) for dataset, _, file in record.config["DATASETS"]["SKIPPED"]]
        assert listed == (skipped if name == "broken" else [])
        log = (tmp_path / name / "log.txt").read_text()
        assert ("000005.jpg" in log) == (name == "broken")
        tensors.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"])
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert metrics[0] == metrics[1]

    # A resumed run leaves out the same images without being told.
    monkeypatch.setenv("DETECTRON2_DATASETS", str(sets[0]))
    (tmp_path / "broken/record.json").unlink()
    arguments = ["--config-file", SHAPES_CONFIG, *overrides, "OUTPUT_DIR", tmp_path / "broken"]
    assert run_tool("train", "--resume", *arguments)[0] == 0
    assert RunRecord.read(tmp_path / "broken/record.json").metrics == metrics[0]

    detector = ["detector", tmp_path / "rest/config.yaml", tmp_path / "rest/model_final.pth", "--device", "cpu"]
    detector += ["--corruptions", "none", "--workers", 0, "--output", tmp_path / "robustness"]
    assert run_tool("evaluate", *detector)[0] == 2
    status, _, err = run_tool("evaluate", *detector, OPTION)
    assert status == 0, err
    record = RunRecord.read(tmp_path / "robustness/record.json")
    assert record.metrics["P/bbox/AP"] == metrics[1]["bbox/AP"]
    assert [row[2] for row in record.config["DATASETS.SKIPPED"]] == ["000003.jpg"]


def test_in_vocs_format_too(shapes: Path, converted: Maker, tmp_path: Path, run_tool: RunTool) -> None:
    """The evaluator counts neither the image's objects nor its list's line."""
    write_voc(shapes / "shapes", tmp_path / "voc", "val")
    damage(tmp_path / "voc/JPEGImages/val photo 3.png")
    arguments = ["--config-file", SHAPES_CONFIG, *SMALL, "MODEL.MASK_ON", False, "MODEL.BACKBONE.FROM_SCRATCH", True]
    given = ["--train", f"mine={tmp_path}/voc:val", "--test", f"mine_val={tmp_path}/voc:val"]
    arguments = [*given, *arguments, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", 0]
    arguments += ["SOLVER.IMS_PER_BATCH", 2, "TEST.EXPECTED_RESULTS", "[]", "OUTPUT_DIR", tmp_path / "run"]
    status, _, err = run_tool("train", OPTION, *arguments)
    assert status == 0, err
    cfg = load_config(tmp_path / "run/config.yaml")
    register_datasets(cfg)
    assert [item["image_id"] for item in DatasetCatalog.get("mine_val")] == [f"val photo {n}" for n in (1, 2, 4, 5, 6)]
    evaluator = build_evaluator(cfg, "mine_val")
    assert set(evaluator.evaluate()) == {"bbox", "bbox-11point"}
