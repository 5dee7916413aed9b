"""Detectors that Detectron2 itself wrote: refused by name, and taken as they are where that is asked for."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model

from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_trainer import run, same, weights

# pycocotools under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RunTool = Callable[..., tuple[int, str, str]]
OPTION = "--allow-unverified-detector"
DETECTRON2_FEEDING = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]]
DETECTRON2_FEEDING += ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0], "MODEL.RESNETS.STRIDE_IN_1X1", False]
SETTINGS: list[object] = [*SMALL, *DETECTRON2_FEEDING, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []]
SETTINGS += ["SOLVER.AMP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()]
SETTINGS += ["DATALOADER.NUM_WORKERS", 0, "MODEL.FAST_ROI_ALIGN", False, "SEED", 5]


@pytest.fixture(autouse=True)
def data(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))


@pytest.fixture(scope="module")
def plain(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The OUTPUT_DIR of Detectron2's own trainer, in random weights that find many things, fed in BGR."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes))
        cfg = load_config(SHAPES_CONFIG, [*SETTINGS, "OUTPUT_DIR", folder])
        register_datasets(cfg)
        torch.manual_seed(0)
        trainer = DefaultTrainer(cfg)
        trainer.model.roi_heads.box_predictor.cls_score.weight.data.mul_(6)
        trainer.iter = 2
        trainer.checkpointer.save("model_final", iteration=2)
    (folder / "config.yaml").write_text(cfg.dump())
    content = torch.load(folder / "model_final.pth")
    arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
    with open(folder / "model_zoo.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    torch.save(content["model"], folder / "state.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model_final.pth", "model_zoo.pkl", "state.pth"])
def test_evaluated_as_by_detectron2(plain: Path, name: str, tmp_path: Path, run_tool: RunTool) -> None:
    arguments = ["--config-file", plain / "config.yaml", "--eval-only", "MODEL.WEIGHTS", plain / name]
    arguments += ["OUTPUT_DIR", tmp_path / "ours"]
    status, _, err = run_tool("train", *arguments)
    assert status == 2
    assert f"give {OPTION}" in err
    assert not (tmp_path / "ours").exists()
    status, _, err = run_tool("train", OPTION, *arguments)
    assert status == 0, err
    record = RunRecord.read(tmp_path / "ours/eval_record.json")
    assert record.backbone["unverified_detector"]["source"] == name
    assert record.threat_model is None

    cfg = load_config(plain / "config.yaml", ["OUTPUT_DIR", tmp_path / "theirs"])
    model = build_model(cfg)
    model.load_state_dict(torch.load(plain / "state.pth"))
    evaluator = COCOEvaluator("shapes_val", output_dir=str(tmp_path / "theirs"))
    theirs = DefaultTrainer.test(cfg, model, evaluator)
    for task, numbers in theirs.items():
        for metric in ("AP", "AP50", "AP75"):
            assert record.metrics[f"{task}/{metric}"] == pytest.approx(numbers[metric], abs=1e-9)
    found, expected = (
        json.loads((tmp_path / whose / "coco_instances_results.json").read_text())
        for whose in ("ours/inference", "theirs")
    )
    assert found == expected
    assert len(found) > 3


@pytest.mark.slow
def test_training_begins_with_it_as_detectron2s(plain: Path, tmp_path: Path) -> None:
    cfg = load_config(
        plain / "config.yaml", ["MODEL.WEIGHTS", plain / "model_final.pth", "SOLVER.CHECKPOINT_PERIOD", 2]
    )
    cfg.OUTPUT_DIR = str(tmp_path / "refused")
    with pytest.raises(InputError, match=OPTION):
        run(cfg)
    cfg.MODEL.ALLOW_UNVERIFIED, cfg.OUTPUT_DIR = True, str(tmp_path / "ours")
    ours, our_losses = run(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "theirs")
    theirs, their_losses = run(cfg, kind=DefaultTrainer)
    assert our_losses.rows == their_losses.rows
    assert same(weights(ours.model), weights(theirs.model))

    record = RunRecord.read(tmp_path / "ours/record.json")
    origin = {"source": "model_final.pth", "source_sha256": record.backbone["unverified_detector"]["source_sha256"]}
    assert record.backbone == {"unverified_detector": origin}
    # What was trained from it is no more verified, and still says where it began.
    content = torch.load(tmp_path / "ours/model_0000001.pth", weights_only=True)
    assert content["unverified_detector"] == origin
    resumed = Trainer(load_config(tmp_path / "ours/config.yaml"))
    resumed.resume_or_load()
    assert resumed.checkpointer.provenance()[0] == record.backbone


def test_other_classes_than_its_own_are_new(plain: Path, small_cfg: CfgNode) -> None:
    small_cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.ALLOW_UNVERIFIED", True])
    model = build_model(small_cfg)
    BackboneCheckpointer(model, cfg=small_cfg).load(str(plain / "model_final.pth"))
    held = torch.load(plain / "state.pth")
    assert torch.equal(model.proposal_generator.rpn_head.conv.weight, held["proposal_generator.rpn_head.conv.weight"])
    with pytest.raises(InputError, match="lacks"):
        BackboneCheckpointer(model, cfg=small_cfg, whole_detector=True).load(str(plain / "model_final.pth"))


def test_a_backbone_alone_has_to_be_converted(plain: Path, small_cfg: CfgNode, tmp_path: Path) -> None:
    small_cfg.MODEL.ALLOW_UNVERIFIED = True
    held = torch.load(plain / "state.pth")
    short = {name.removeprefix("backbone.bottom_up."): tensor for name, tensor in held.items() if "bottom_up" in name}
    for content in (short, {name: tensor for name, tensor in held.items() if "bottom_up" in name}):
        torch.save({"model": content}, tmp_path / "backbone.pth")
        with pytest.raises(InputError, match="robust-backbones convert"):
            BackboneCheckpointer(build_model(small_cfg), cfg=small_cfg).load(str(tmp_path / "backbone.pth"))


@pytest.mark.slow
def test_pictures_and_attacks_of_it(plain: Path, shapes: Path, tmp_path: Path, run_tool: RunTool) -> None:
    images = [shapes / "shapes/val/000001.jpg", "--output", tmp_path / "pictures", "--device", "cpu"]
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/model_final_1.pkl").write_bytes((plain / "model_zoo.pkl").read_bytes())
    for given in (["--weights", plain], ["--weights", tmp_path / "zoo/model_final_1.pkl"]):
        assert run_tool("predict", *images, *given)[0] == 2
    zoo = [*given, "--config-file", plain / "config.yaml", OPTION]
    assert run_tool("predict", *images, "--weights", plain, OPTION)[0] == 0
    rows = (tmp_path / "pictures/coco_results.json").read_text()
    assert len(json.loads(rows)) > 3
    assert run_tool("predict", *images, *zoo)[0] == 0
    assert (tmp_path / "pictures/coco_results.json").read_text() == rows

    attack = ["--corruptions", "none", "--attacks", "classification", "--attack-steps", "2", "--limit", "2"]
    attack += ["--threat-model", "Linf:2/255", "--device", "cpu", "--workers", 0, "--output", tmp_path / "attacked"]
    detector = ["detector", plain / "config.yaml", plain / "model_zoo.pkl", *attack]
    assert run_tool("evaluate", *detector)[0] == 2
    status, _, err = run_tool("evaluate", *detector, OPTION)
    assert status == 0, err
    record = RunRecord.read(tmp_path / "attacked/record.json")
    assert record.backbone["unverified_detector"]["source"] == "model_zoo.pkl"
    assert record.metrics["attack-classification/loss"] > record.metrics["attack-classification/clean_loss"]
