"""Images that cannot be read: named and refused, or left out as if the set had never held them; images held out."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.detection.config import load_config
from robust_backbones.detection.datasets import (
    SHOWN_CLASSES,
    check_datasets,
    class_names,
    derive_classes,
    register_datasets,
)
from robust_backbones.detection.evaluators import build_evaluator, coco_metrics, ground_truth
from robust_backbones.detection.left_out import unreadable_rows
from robust_backbones.errors import InputError
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


@pytest.mark.slow
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


def test_broken_rows_are_left_to_the_check_and_rows_of_one_file_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    rows = [None, 5, {"id": 1}, {"id": 2, "file_name": 7}, {"id": [3], "file_name": "a.jpg"}]
    rows += [{"id": number, "file_name": "a.jpg"} for number in (4, 5)]
    (tmp_path / "a.json").write_text(json.dumps({"images": rows, "annotations": [], "categories": []}))
    found = unreadable_rows("mine", AnnotatedSet(tmp_path / "a.json", tmp_path))
    assert found == [("mine", 4, "a.jpg"), ("mine", 5, "a.jpg")]


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_held_out_images_are_tested_and_not_trained_on(kind: str, shapes: Path, tmp_path: Path) -> None:
    """They are those of the lowest hashes, counted by an independent sort; annotations in any order give the same."""
    source = shapes / "shapes"
    if kind == "voc":
        write_voc(source, tmp_path / "voc", "train")
        sets = ["DATASETS.VOC_FORMAT", (("mine", str(tmp_path / "voc"), "train"),)]
    else:
        content = json.loads((source / "annotations/instances_train.json").read_text())
        content["images"].reverse()
        (tmp_path / "mine.json").write_text(json.dumps(content))
        sets = ["DATASETS.COCO_FORMAT", (("mine", str(tmp_path / "mine.json"), str(source / "train")),)]
    sets += ["DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine_held_out",), "MODEL.MASK_ON", False]

    def registered(count: int) -> tuple[set[str], set[str]]:
        cfg = load_config(SHAPES_CONFIG, [*sets, "DATASETS.HELD_OUT", count], classes=0)
        register_datasets(cfg)
        names = [
            {Path(item["file_name"]).name for item in DatasetCatalog.get(name)} for name in ("mine", "mine_held_out")
        ]
        return names[0], names[1]

    cfg = load_config(SHAPES_CONFIG, [*sets, "DATASETS.TEST", ("mine",)], classes=0)
    register_datasets(cfg)
    every = {Path(item["file_name"]).name for item in DatasetCatalog.get("mine")}
    for count in (4, 3):
        held = set(sorted(every, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])
        assert registered(count) == (every - held, held)
    cfg = load_config(SHAPES_CONFIG, [*sets, "DATASETS.HELD_OUT", 3], classes=0)
    register_datasets(cfg)
    derive_classes(cfg)
    check_datasets(cfg)
    assert class_names("mine_held_out") == class_names("mine")
    truth = ground_truth("mine_held_out").dataset
    assert {Path(row["file_name"]).name for row in truth["images"]} == held
    assert MetadataCatalog.get("mine_held_out").get(SHOWN_CLASSES)  # a few images need not show all classes
    # A perfect detector of these images alone finds all.
    results = [{**row, "score": 1.0} for row in truth["annotations"]]
    assert coco_metrics(ground_truth("mine_held_out"), results, "bbox")["AP"] == pytest.approx(100)
    with pytest.raises(InputError, match="HELD_OUT 1000 leaves none"):
        registered(1000)


@pytest.mark.slow
def test_a_run_with_held_out_images(
    shapes: Path, converted: Maker, tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is the run of two annotation files with these images, in weights and AP."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    source = shapes / "shapes"
    content = json.loads((source / "annotations/instances_train.json").read_text())
    order = sorted(content["images"], key=lambda row: hashlib.sha256(row["file_name"].encode()).hexdigest())
    for name, rows in (("rest", order[3:]), ("held", order[:3])):
        ids = {row["id"] for row in rows}
        part = {"images": [row for row in content["images"] if row["id"] in ids]}
        part["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, **part}))
    given = ["MODEL.WEIGHTS", converted("resnet18"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"]
    given += ["DATALOADER.NUM_WORKERS", 0, "TEST.EXPECTED_RESULTS", "[]"]
    runs = {
        "one": ["--train", f"mine={source}/annotations/instances_train.json:{source}/train", "--test", "mine_held_out"],
        "two": [
            "--train",
            f"mine={tmp_path}/rest.json:{source}/train",
            "--test",
            f"v={tmp_path}/held.json:{source}/train",
        ],
    }
    found = []
    for name, words in runs.items():
        held = ["DATASETS.HELD_OUT", 3 if name == "one" else 0, "OUTPUT_DIR", tmp_path / name]
        status, _, err = run_tool("train", "--config-file", SHAPES_CONFIG, *words, *SMALL, *TINY, *given, *held)
        assert status == 0, err
        weights = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        found.append((RunRecord.read(tmp_path / name / "record.json").metrics, weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_each_of_several_test_sets_has_a_folder_for_its_detections(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg = load_config(SHAPES_CONFIG, ["DATASETS.TEST", ("shapes_val", "shapes_train"), "OUTPUT_DIR", tmp_path])
    register_datasets(cfg)
    for name in cfg.DATASETS.TEST:
        evaluator = build_evaluator(cfg, name)
        evaluator.process([], [])
        evaluator.evaluate()
    assert len(list(tmp_path.rglob("coco_instances_results.json"))) == 2
