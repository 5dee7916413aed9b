"""The package as a library: Detectron2's own configuration, trainer and data sets, without any of our commands."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.synthetic import CLASSES
from robust_backbones.detection import Predictor, Trainer, add_config, evaluate, load_config
from robust_backbones.errors import InputError
from robust_backbones.runs.identity import flat
from robust_backbones.runs.record import RunRecord
from tests.conftest import global_generators
from tests.detection.conftest import SHAPES_CONFIG, SMALL

Maker = Callable[[str], Path]
NAME = "shapes_by_hand"


@pytest.fixture
def by_hand(shapes: Path) -> Iterator[list[dict[str, Any]]]:
    """A set registered as Detectron2's tutorial has it, with ``thing_classes`` alone; its items, to be changed."""
    source = shapes / "shapes"
    items = load_coco_json(str(source / "annotations/instances_val.json"), str(source / "val"))
    for item in items:
        for annotation in item["annotations"]:
            annotation["category_id"] -= 1  # COCO counts from 1
    DatasetCatalog.register(NAME, lambda: deepcopy(items))
    MetadataCatalog.get(NAME).thing_classes = list(CLASSES)
    yield items
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg(converted: Maker, tmp_path: Path) -> CfgNode:
    """Of two iterations, as a user of Detectron2 makes it."""
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(SHAPES_CONFIG))
    cfg.merge_from_list([*SMALL, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(converted("resnet18"))])
    cfg.merge_from_list(["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "TEST.EXPECTED_RESULTS", []])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2, "SEED", 1])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "run")])
    return cfg


def test_our_keys_leave_detectron2s_as_they_are() -> None:
    theirs = flat(get_cfg())
    cfg = get_cfg()
    add_config(cfg)
    assert {key: value for key, value in flat(cfg).items() if key in theirs} == theirs
    assert flat(cfg).keys() - theirs.keys() == DETECTOR_KEYS.keys()
    cfg.merge_from_file(str(SHAPES_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    assert flat(cfg) == flat(load_config(str(SHAPES_CONFIG), ["MODEL.DEVICE", "cpu"]))


def test_a_set_of_the_catalog_is_trained_and_evaluated_on(
    cfg: CfgNode, by_hand: list[dict[str, Any]], shapes: Path
) -> None:
    trainer = Trainer(cfg)
    with pytest.raises(InputError, match="resume_or_load"):
        trainer.train()
    trainer.resume_or_load(resume=False)
    metrics = trainer.train()
    assert {"bbox/AP", "segm/AP50", "bbox/AP-cross"} <= metrics.keys()
    record = RunRecord.read(Path(cfg.OUTPUT_DIR) / "record.json")
    assert (record.dataset, record.metrics, record.seed) == (NAME, metrics, 1)
    drawn = global_generators()
    assert evaluate(cfg.OUTPUT_DIR) == metrics
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    assert evaluate(cfg) == metrics

    predictor = Predictor(cfg.OUTPUT_DIR)
    assert [category["name"] for category in predictor.categories] == list(MetadataCatalog.get(NAME).thing_classes)
    assert predictor(by_hand[0]["file_name"]).has("pred_masks")
    assert global_generators() == drawn

    cfg.SOLVER.MAX_ITER = 3
    with pytest.raises(InputError, match="holds another run"):
        Trainer(cfg)


@pytest.mark.parametrize("seed", [1, -1])
def test_a_seed_holds_whatever_was_drawn_before(
    cfg: CfgNode, by_hand: list[dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    """Heads and images; one is drawn, and said, where none is set."""
    cfg.SEED = seed
    runs = []
    for name in ("one", "other"):
        cfg.OUTPUT_DIR = str(tmp_path / name)
        trainer = Trainer(cfg)
        files = [item["file_name"] for _, batch in zip(range(3), trainer.stream, strict=False) for item in batch]
        runs.append((trainer.checkpointer.model.state_dict(), files))
        cfg.SEED = trainer.cfg.SEED
        assert cfg.SEED >= 0
    (one, images), (other, same_images) = runs
    assert images == same_images
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_the_same_set_in_coco_format_has_the_same_ap(
    cfg: CfgNode, by_hand: list[dict[str, Any]], shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ground truth that is converted in memory gives the numbers of the annotation file."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    metrics = trainer.train()
    cfg.merge_from_list(["MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth", "DATASETS.TEST", ("shapes_val",)])
    assert evaluate(cfg) == pytest.approx(metrics, abs=1e-3, nan_ok=True)


def test_what_cannot_be_trained_or_evaluated_on_is_refused_before(
    cfg: CfgNode, by_hand: list[dict[str, Any]], tmp_path: Path
) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            Trainer(cfg)
        assert not (tmp_path / "run").exists()

    metadata, first = MetadataCatalog.get(NAME), by_hand[0]
    metadata.evaluator_type = "lvis"
    refused("no evaluator for shapes_by_hand of kind lvis")
    del metadata.evaluator_type
    masks = [annotation.pop("segmentation") for item in by_hand for annotation in item["annotations"]]
    refused("MODEL.MASK_ON False")
    first["annotations"][0] |= {"segmentation": masks[0], "category_id": 4}
    refused("objects of class 4")
    first["annotations"][0]["category_id"] = 3
    refused("has no usable mask")
    for item in by_hand:
        for annotation in item["annotations"]:
            annotation["segmentation"] = masks.pop(0)
    image_id = first.pop("image_id")
    refused("KeyError: 'image_id'")
    first["image_id"] = image_id
    MetadataCatalog.remove(NAME)
    refused("name them in MetadataCatalog")
    cfg.DATASETS.TEST = ("nowhere",)
    MetadataCatalog.get(NAME).thing_classes = ["a", "b", "c", "d"]
    refused("unknown data set 'nowhere'")
    cfg.SOLVER.OPTIMIZER = "Adam"
    refused("SOLVER.OPTIMIZER")
    cfg.SOLVER.OPTIMIZER, cfg.DATASETS.TEST = "SGD", (NAME)
    refused(r"DATASETS\.TEST 'shapes_by_hand' is one text, not a tuple: give \(NAME,\)")
    plain = get_cfg()
    plain.OUTPUT_DIR = cfg.OUTPUT_DIR
    with pytest.raises(InputError, match="add_config"):
        Trainer(plain)


@pytest.mark.slow
def test_importing_it_makes_robust_names_paths_and_changes_nothing_else() -> None:
    code = """
import logging, warnings
import robust_backbones.detection
messages = [str(message and message.pattern) for _, message, *_ in warnings.filters]
assert not any("torch.jit" in message or "meshgrid" in message for message in messages), messages
assert logging.getLogger("torch.fx._symbolic_trace").level == logging.NOTSET
from detectron2.utils.file_io import PathManager
try:
    PathManager.get_local_path("robust://nobody")
except Exception as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no published backbone is called 'nobody'" in result.stdout
    assert result.stderr == ""
