"""Longer than planned: refused with the right way, or on by the schedule that is given, as one run of it would."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from robust_backbones.checkpoint.untrusted import read_file
from robust_backbones.detection.run_folder import check_folder
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_trainer import Maker, configuration, run, same, weights


@pytest.fixture
def cfg(shapes: Path, monkeypatch: pytest.MonkeyPatch, converted: Maker, tmp_path: Path) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg = configuration(converted("resnet18"), tmp_path / "run")
    cfg.merge_from_list(["MODEL.MASK_ON", False, "MODEL.FAST_ROI_ALIGN", False, "SOLVER.IMS_PER_BATCH", 1])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,)])
    cfg.DATASETS.TEST = ()
    return cfg


def extended(cfg: CfgNode, *overrides: object) -> CfgNode:
    cfg = cfg.clone()
    cfg.merge_from_list([*overrides])
    assert not check_folder(cfg, resume=True, extend=True)
    return cfg


def kept(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_same_steps_go_on_as_one_run(cfg: CfgNode, decay: float) -> None:
    """3 iterations and 2 more are the 5 of Detectron2's own trainer, where the rate falls at the same iteration."""
    cfg.SOLVER.EMA_DECAY = decay
    _, first = run(cfg)
    longer = extended(cfg, "SOLVER.MAX_ITER", 5)
    assert longer.SOLVER.EXTENDED == ((3, 3, [2]),)
    ours, second = run(longer, resume=True, kind=partial(Trainer, checked=True))
    whole = cfg.clone()
    whole.merge_from_list(["SOLVER.MAX_ITER", 5, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_whole"])
    theirs, losses = run(whole, kind=Trainer if decay else DefaultTrainer)
    assert sorted(second.rows) == [3, 4]
    assert first.rows | second.rows == losses.rows
    assert same(weights(ours.model), weights(theirs.model))
    if decay:
        assert same(kept(Path(cfg.OUTPUT_DIR) / "model_final.pth"), kept(Path(whole.OUTPUT_DIR) / "model_final.pth"))


@pytest.mark.slow
def test_other_steps_hold_from_the_iteration_on_at_which_it_is_extended(cfg: CfgNode) -> None:
    """The rate, which had fallen to a tenth, is that of the new schedule at once; by hand in Detectron2's trainer."""
    rates = [0.001, 0.0505, 0.1, 1.0, 0.1, 0.1]  # warm-up ends at the rate of its own end
    _, first = run(cfg)
    _, second = run(
        extended(cfg, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,)), resume=True, kind=partial(Trainer, checked=True)
    )

    class ByHand(DefaultTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> object:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rates[done])

    whole = cfg.clone()
    whole.merge_from_list(["SOLVER.MAX_ITER", 5, "OUTPUT_DIR", f"{cfg.OUTPUT_DIR}_whole"])
    _, losses = run(whole, kind=ByHand)
    for iteration, row in (first.rows | second.rows).items():
        assert row == pytest.approx(losses.rows[iteration], rel=1e-5), iteration


def test_the_best_of_a_final_evaluation_is_kept(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured after the last checkpoint."""
    values = iter([3.0, 7.0, 5.0, 6.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(values)}})
    cfg.merge_from_list(["TEST.EVAL_PERIOD", 2, "TEST.VISUALIZE", 0])
    cfg.DATASETS.TEST = ("shapes_val",)
    run(cfg)
    ours, _ = run(extended(cfg, "SOLVER.MAX_ITER", 5), resume=True, kind=partial(Trainer, checked=True))
    assert ours.evaluation.best == {"metric": "bbox/AP", "value": 7.0, "iteration": 3}
    assert read_file(Path(cfg.OUTPUT_DIR) / "model_best.pth")["best"]["value"] == 7


def test_what_cannot_be_extended(cfg: CfgNode) -> None:
    with pytest.raises(InputError, match="no run to extend"):
        check_folder(cfg, resume=True, extend=True)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()])
    run(cfg)
    for overrides in (["SOLVER.BASE_LR", 0.5, "SOLVER.MAX_ITER", 9], ["SOLVER.STEPS", (0,)]):
        other = cfg.clone()
        other.merge_from_list(overrides)
        with pytest.raises(InputError, match=f"holds another run .*{overrides[0]}"):
            check_folder(other, resume=True, extend=True)
    cfg.SOLVER.MAX_ITER = 9
    with pytest.raises(InputError, match=r"another OUTPUT_DIR.*--resume --extend"):
        Trainer(cfg)


def test_the_command_says_the_way_and_the_record_that_it_was_gone(
    cfg: CfgNode, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    folder = Path(cfg.OUTPUT_DIR)
    overrides = [*SMALL, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS]
    overrides += ["TEST.EXPECTED_RESULTS", "[]", "SOLVER.STEPS", "()", "OUTPUT_DIR", folder, "MODEL.DEVICE", "cpu"]

    def train(*arguments: object) -> tuple[int, str, str]:
        return run_tool("train", "--config-file", SHAPES_CONFIG, *arguments)

    assert train(*overrides, "SOLVER.MAX_ITER", 1)[0] == 0
    before = (folder / "record.json").read_text()
    for given in (["--resume"], []):
        status, _, err = train(*given, *overrides, "SOLVER.MAX_ITER", 2)
        assert status == 2
        assert "--resume --extend" in err
    assert train("--extend", *overrides, "SOLVER.MAX_ITER", 2)[0] == 2
    assert (folder / "record.json").read_text() == before
    status, _, err = train("--resume", "--extend", *overrides, "SOLVER.MAX_ITER", 2)
    assert status == 0, err
    assert "extended at iteration 1 of 1" in (folder / "log.txt").read_text()
    record = RunRecord.read(folder / "record.json")
    assert record.config["SOLVER"]["EXTENDED"] == [[1, 1, []]]
    assert record.config["SOLVER"]["MAX_ITER"] == 2
    assert json.loads((folder / "record_1.json").read_text()) == json.loads(before)
    # Given again, the same command finds it finished; so does one without --extend.
    for given in (["--resume", "--extend"], ["--resume"]):
        assert "finished before" in train(*given, *overrides, "SOLVER.MAX_ITER", 2)[1]
