"""Training: it is Detectron2's, it resumes exactly, and it keeps and records what it measured."""

import copy
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.modeling.backbone.swin import WindowAttention
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, write_backbone
from robust_backbones.checkpoint.format import sha256
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.detection.config import load_config
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.evaluation import evaluate
from robust_backbones.detection.hooks import PreciseBN, WeightAverage
from robust_backbones.detection.run_folder import check_expected
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import DivergedError, PreemptedError, TrainingFailedError
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import RETINANET, SHAPES_CONFIG, SMALL

Maker = Callable[[str], Path]


def configuration(weights: Path, output: Path) -> CfgNode:
    cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []])
    register_datasets(cfg)
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(output)])
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 2])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (64, 96), "SEED", 5])
    return cfg


@pytest.fixture(autouse=True)
def data(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))


@pytest.fixture
def cfg(data: None, converted: Maker, tmp_path: Path) -> CfgNode:
    return configuration(converted("resnet18"), tmp_path / "run")


@pytest.fixture(scope="module")
def unbroken(
    shapes: Path, converted: Maker, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, dict[int, dict[str, float]]]:
    """A run of ``cfg`` that is evaluated, and drawn, every other iteration; its losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes))
        cfg = configuration(converted("resnet18"), tmp_path_factory.mktemp("unbroken"))
        cfg.merge_from_list(["TEST.EVAL_PERIOD", 2, "TEST.VISUALIZE", 2])
        trainer, losses = run(cfg)
    assert isinstance(trainer, Trainer)
    return trainer, losses.rows


class Losses(HookBase):
    """Every loss of every iteration; stops the run after ``last`` as a kill would."""

    def __init__(self, last: int | None = None) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.last = last

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.rows[self.trainer.iter] = {name: value for name, (value, _) in latest.items() if "loss" in name}
        if self.trainer.iter == self.last:
            raise KeyboardInterrupt


def run(
    cfg: CfgNode, *, resume: bool = False, last: int | None = None, kind: type[DefaultTrainer] = Trainer
) -> tuple[DefaultTrainer, Losses]:
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    seed_all_rng(5)  # Detectron2's trainer leaves that to its command
    trainer, losses = kind(cfg), Losses(last)
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume)
    if last is None:
        trainer.train()
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hooks.PeriodicWriter, "after_train", lambda self: None)  # a kill leaves no time for it
            trainer.train()
    return trainer, losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mask_on", [pytest.param(True, marks=pytest.mark.slow), False])
def test_losses_and_detections_are_detectron2s(cfg: CfgNode, mask_on: bool) -> None:
    """20 iterations of its DefaultTrainer (boxes: 5), on a CPU in float32, with its ROIAlign: not a bit differs."""
    cfg.MODEL.FAST_ROI_ALIGN = False
    iterations, step = (20, 15) if mask_on else (5, 3)
    cfg.merge_from_list(["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (step,), "MODEL.MASK_ON", mask_on])
    cfg.SOLVER.CHECKPOINT_PERIOD = iterations  # what is saved is the other tests'
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 2 if mask_on else 0, "SOLVER.IMS_PER_BATCH", 2 if mask_on else 1])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    ours, our_losses = run(cfg)
    cfg.OUTPUT_DIR += "_theirs"
    theirs, their_losses = run(cfg, kind=DefaultTrainer)
    assert our_losses.rows == their_losses.rows
    assert len(our_losses.rows) == iterations
    assert ("loss_mask" in our_losses.rows[0]) == mask_on
    assert same(weights(ours.model), weights(theirs.model))
    loader = build_detection_test_loader(cfg, "shapes_val")
    for batch in loader:
        found = []
        for trainer in (ours, theirs):
            trainer.model.eval()
            with torch.no_grad():
                found.append(trainer.model(batch)[0]["instances"])
        assert len(found[0]) > 0
        assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
        assert torch.equal(found[0].scores, found[1].scores)
        assert not mask_on or torch.equal(found[0].pred_masks, found[1].pred_masks)


def logged(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict[str, Any]]:
    """Without losses, which are medians since the process started, and times."""
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "AP" in name or name in ("iteration", "lr")} for row in whole
    ]


TRAINED_NORMS = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
PRECISE_BN = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["DATALOADER.NUM_WORKERS", 2], marks=pytest.mark.slow),
        ["MODEL.MASK_ON", False, "SOLVER.EMA_DECAY", 0.9, "TEST.EVAL_PERIOD", 1],
        # RetinaNet divides its losses by a running mean, which is no part of its state.
        pytest.param(RETINANET, marks=pytest.mark.slow),
        # Checkpoint and evaluation fall together: precise BN runs before both.
        pytest.param(
            [*TRAINED_NORMS, *PRECISE_BN, "TEST.EVAL_PERIOD", 2, "SOLVER.AMP.ENABLED", True], marks=pytest.mark.slow
        ),
    ],
    ids=["mask", "box_average", "retinanet", "norms"],
)
def test_a_killed_run_resumes_as_the_unbroken_one(cfg: CfgNode, overrides: list[Any]) -> None:
    cfg.merge_from_list(overrides)
    unbroken, losses = run(cfg)
    assert isinstance(unbroken, Trainer)
    cfg.OUTPUT_DIR += "_killed"
    run(cfg, last=2)  # after the checkpoint of iteration 2
    log = Path(cfg.OUTPUT_DIR) / "metrics.json"
    assert max(logged(log)) <= 1 + (cfg.TEST.EVAL_PERIOD == 1)  # what the checkpoint covers, and an evaluation
    with open(log, "a") as file:
        file.write('{"iteration": 3, "total_l')  # as a kill could leave it before
    resumed, again = run(cfg, resume=True)
    assert rows(log) == rows(Path(unbroken.cfg.OUTPUT_DIR) / "metrics.json")
    assert isinstance(resumed, Trainer)
    assert sorted(again.rows) == [2, 3, 4]
    assert again.rows == {iteration: losses.rows[iteration] for iteration in again.rows}
    for path in Path(unbroken.cfg.OUTPUT_DIR).glob("*.pth"):
        assert sha256(path) == sha256(Path(cfg.OUTPUT_DIR) / path.name), path.name
    assert same(weights(resumed.model), weights(unbroken.model))
    assert same(weights(resumed.evaluated_model), weights(unbroken.evaluated_model))
    assert resumed.evaluation.results == unbroken.evaluation.results
    assert resumed.evaluation.best == unbroken.evaluation.best
    assert (resumed.average is not None) == (cfg.SOLVER.EMA_DECAY > 0)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [2, 5])
def test_a_signal_in_an_evaluation_is_answered_before_the_next_image(
    cfg: CfgNode, unbroken: tuple[Trainer, dict[int, dict[str, float]]], iteration: int
) -> None:
    """One amid the training, and the last one; the resumed run is the unbroken one."""
    cfg.merge_from_list(["TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100])
    trainer = Trainer(cfg)
    seen: list[int] = []

    def second_image_of_that_evaluation(model: nn.Module, *_: object) -> None:
        done = trainer.iter + (trainer.iter < trainer.max_iter)
        if not model.training and done == iteration:
            seen.append(done)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.checkpointer.model.register_forward_hook(second_image_of_that_evaluation)
    trainer.resume_or_load(False)
    with pytest.raises(PreemptedError, match=f"in the evaluation after iteration {iteration} of 5"):
        trainer.train()
    assert len(seen) == 2
    resumed, losses = run(cfg, resume=True)
    assert isinstance(resumed, Trainer)
    assert losses.rows == {number: row for number, row in unbroken[1].items() if number >= iteration}
    assert resumed.evaluation.best == unbroken[0].evaluation.best
    assert same(weights(resumed.model), weights(unbroken[0].model))
    numbers = [logged(Path(one.cfg.OUTPUT_DIR) / "metrics.json") for one in (resumed, unbroken[0])]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_a_cut_off_evaluation_is_repeated(
    cfg: CfgNode, unbroken: tuple[Trainer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.TEST.EVAL_PERIOD = 2

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", killed)
        trainer = Trainer(cfg)
        trainer.resume_or_load(False)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert not (Path(cfg.OUTPUT_DIR) / "model_best.pth").exists()
    evaluated = []
    test = Trainer.test
    monkeypatch.setattr(Trainer, "test", lambda self, *arguments: evaluated.append(self.iter) or test(*arguments))
    resumed, _ = run(cfg, resume=True)
    assert evaluated == [2, 3, 5]  # before iteration 2, after iteration 3 (both after a multiple of 2), at the end
    assert isinstance(resumed, Trainer)
    assert resumed.evaluation.best == unbroken[0].evaluation.best


def test_an_average_keeps_whole_numbers() -> None:
    """Of a Swin the places in its table of relative positions, a buffer of integers."""
    net = WindowAttention(4, window_size=(7, 7), num_heads=1)
    average = WeightAverage(net, 0.9999)
    for _ in range(2):
        average.after_step()
    assert torch.equal(average.model.relative_position_index, net.relative_position_index)


def test_precise_statistics_are_those_of_what_is_evaluated(cfg: CfgNode) -> None:
    """Of the average, where one is kept: computed again from its weights and the same images they are the same."""
    cfg.merge_from_list([*TRAINED_NORMS, *PRECISE_BN, "MODEL.MASK_ON", False, "SOLVER.EMA_DECAY", 0.9])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "DATASETS.TEST", ()])
    trainer = run(cfg)[0]
    again = copy.deepcopy(trainer.evaluated_model)
    (hook,) = (one for one in trainer._hooks if isinstance(one, PreciseBN))
    trainer.iter, hook._model = 0, again
    hook.update_stats()
    found, wanted = (
        {name: tensor for name, tensor in model.state_dict().items() if ".running_" in name}
        for model in (trainer.evaluated_model, again)
    )
    assert found
    assert same(found, wanted)


@pytest.mark.slow
def test_neither_evaluation_nor_a_signal_disturbs_training(
    cfg: CfgNode, unbroken: tuple[Trainer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(PreemptedError, match="after iteration 2 of 5"):
        patch.setattr(Trainer, "_asked_to_stop", lambda self: self.iter == 1)
        run(cfg)
    _, again = run(cfg, resume=True)
    trainer, losses = unbroken
    assert again.rows == {iteration: row for iteration, row in losses.items() if iteration > 1}
    events = list(Path(trainer.cfg.OUTPUT_DIR).glob("events.out.tfevents.*"))
    assert any(b"shapes_val/" in path.read_bytes() and b"PNG" in path.read_bytes() for path in events)


def test_the_best_and_the_average_are_kept(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 7.0, 7.0, 5.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": 1.0}, "segm": {"AP": next(values)}})
    cfg.merge_from_list(["TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.EMA_DECAY", 0.5])
    averages: dict[int, dict[str, Tensor]] = {}
    mine: dict[str, Tensor] = {}

    class Average(HookBase):
        """The average by its definition, beside the trainer's own."""

        def before_train(self) -> None:
            mine.update(weights(self.trainer.checkpointer.model))

        def after_step(self) -> None:
            for name, tensor in weights(self.trainer.checkpointer.model).items():
                first = self.trainer.iter == 0
                mine[name] = tensor if first else mine[name] + 0.5 * (tensor - mine[name])
            averages[self.trainer.iter + 1] = dict(mine)

    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = Trainer(cfg)
    trainer._hooks.insert(0, Average())
    trainer._hooks[0].trainer = trainer
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.evaluation.best == {"metric": "segm/AP", "value": 7.0, "iteration": 2}
    for name, iteration in (("model_best", 2), ("model_final", 4)):
        held = torch.load(Path(cfg.OUTPUT_DIR) / f"{name}.pth", weights_only=True)["model"]
        for key, tensor in averages[iteration].items():
            torch.testing.assert_close(held[key], tensor, msg=f"{name} {key}")
    assert not same(averages[4], weights(trainer.checkpointer.model))
    # The best is no checkpoint to resume from.
    # Nor is the average: a longer run continues from the trained weights.
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_0000003.pth"


@pytest.mark.slow
def test_a_record_says_what_was_measured(unbroken: tuple[Trainer, Any]) -> None:
    cfg = unbroken[0].cfg.clone()
    record = RunRecord.read(Path(cfg.OUTPUT_DIR) / "record.json")
    assert (record.task, record.dataset, record.backbone["arch"]) == ("segmentation", "shapes_val", "resnet18")
    assert {"bbox/AP", "segm/AP50", "bbox/AP-circle", "best/segm/AP", "best/iteration"} <= record.metrics.keys()
    assert "unfilled_tensors" not in record.backbone

    cfg.merge_from_list(["MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth"])
    evaluate(cfg)
    measured = RunRecord.read(Path(cfg.OUTPUT_DIR) / "eval_record.json")
    assert measured.metrics == {name: value for name, value in record.metrics.items() if not name.startswith("best/")}
    evaluate(cfg)
    best = Path(cfg.OUTPUT_DIR) / "model_best.pth"
    evaluate(best)
    places = [Path(cfg.OUTPUT_DIR) / f"eval_record{number}.json" for number in ("", "_1", "_2")]
    assert RunRecord.read(places[0]).config["MODEL"]["WEIGHTS"] == str(best)
    assert RunRecord.read(places[1]).config == measured.config  # of another detector: nothing is lost
    assert not places[2].exists()


def test_results_are_held_against_the_expected_ones(small_cfg: CfgNode) -> None:
    small_cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50", 50.0, 1.0], ["segm", "AP", 30.0, 2.0]]
    check_expected(small_cfg, {"bbox/AP50": 50.9, "segm/AP": 28.1, "bbox/AP": 0.0})
    for metrics in ({"bbox/AP50": 51.1, "segm/AP": 30.0}, {"bbox/AP50": None, "segm/AP": 30.0}, {"segm/AP": 30.0}):
        with pytest.raises(TrainingFailedError, match=r"bbox/AP50 is .* says 50\.0 ± 1\.0"):
            check_expected(small_cfg, metrics)


def test_a_partial_backbone_marks_the_record(
    cfg: CfgNode, torchvision_file: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    lost = {"res4.1.conv2.weight", "res5.0.shortcut.weight"}
    for name in lost:
        del tensors[name]
    write_backbone(tmp_path / "partial.pkl", tensors, BackboneMetadata.of(checkpoint))
    cfg.merge_from_list(["MODEL.WEIGHTS", str(tmp_path / "partial.pkl"), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()])
    cfg.MODEL.BACKBONE.ALLOW_PARTIAL = True
    Path(cfg.OUTPUT_DIR).mkdir()
    with caplog.at_level(logging.WARNING):
        run(cfg)
    assert all(any(name in message for message in caplog.messages) for name in lost)
    record = RunRecord.read(Path(cfg.OUTPUT_DIR) / "record.json")
    unfilled = {f"backbone.bottom_up.{name}" for name in lost}
    assert set(record.backbone["unfilled_tensors"]) == unfilled
    cfg.merge_from_list(["MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth"])  # the mark stays with the detector
    evaluate(cfg)
    record = RunRecord.read(Path(cfg.OUTPUT_DIR) / "eval_record.json")
    assert set(record.backbone["unfilled_tensors"]) == unfilled


def test_a_diverged_run_says_so(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e6, "SOLVER.WARMUP_ITERS", 0])
    with pytest.raises(DivergedError, match=r"SOLVER\.BASE_LR") as error:
        run(cfg)
    assert "\n" not in str(error.value)
