"""Pre-training runs: complete, reproducible, resumable, and never over another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import robust_backbones.pretrain as pretrain_module
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoints import read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.pretrain import PretrainConfig, pretrain
from robust_backbones.records import RunRecord
from robust_backbones.threat_models import ThreatModel

CONFIG = PretrainConfig(
    threat_model=ThreatModel("L2", 0.5),
    arch="resnet18",
    attack=AttackConfig(steps=1, random_start=True),
    eval_attack=AttackConfig(steps=1),
    epochs=3,
    batch_size=16,
    lr=0.01,
    schedule="one_cycle",
    image_size=32,
    val_resize=32,
)


@pytest.fixture(scope="module")
def data(shapes: Path) -> Path:
    return shapes / "shapes_classification"


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, pretrain(CONFIG, data, output, workers=0)


def test_a_run_leaves_checkpoint_metrics_and_record(finished: tuple[Path, RunRecord]) -> None:
    output, record = finished
    assert RunRecord.read(output / "record.json") == record
    assert record.threat_model == "L2:0.5"
    assert record.config["eval_threat_model"] == "L2:0.5"
    assert 0 <= record.metrics["robust_accuracy"] <= record.metrics["clean_accuracy"] <= 100
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["clean_accuracy"] == record.metrics["clean_accuracy"]
    checkpoint = read_checkpoint(output / "checkpoint.pt")
    assert (checkpoint.spec.arch, checkpoint.spec.num_classes) == ("resnet18", 4)
    assert checkpoint.threat_model == ThreatModel("L2", 0.5)
    assert not list(output.glob(".*"))


def test_a_run_cut_off_at_any_epoch_ends_the_same(
    finished: tuple[Path, RunRecord], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within epoch 3, then resumed: same weights, same metrics, no epoch twice in the log."""
    original = pretrain_module.train_one_epoch

    def cut_off(*arguments: object, description: str, **options: object) -> dict[str, float]:
        if description.startswith("epoch 3"):
            raise KeyboardInterrupt
        return original(*arguments, description=description, **options)

    output = tmp_path / "whole"
    monkeypatch.setattr(pretrain_module, "train_one_epoch", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, output, workers=0)
    assert not (output / "record.json").exists()
    monkeypatch.undo()
    record = pretrain(CONFIG, data, output, workers=0)

    assert record.metrics == finished[1].metrics
    resumed, whole = (read_checkpoint(folder / "checkpoint.pt").state_dict for folder in (output, finished[0]))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_cut_off_before_its_record_gets_one(finished: tuple[Path, RunRecord], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "whole"
    shutil.copytree(finished[0], output)
    (output / "record.json").unlink()
    assert pretrain(CONFIG, data, output, workers=0).metrics == finished[1].metrics


def test_a_finished_run_is_not_run_again(finished: tuple[Path, RunRecord], data: Path) -> None:
    output, record = finished
    stamp = (output / "checkpoint.pt").stat().st_mtime_ns
    assert pretrain(CONFIG, data, output, workers=0) == record
    assert (output / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_another_run_is_never_overwritten(finished: tuple[Path, RunRecord], data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another run \(it differs in lr\)"):
        pretrain(replace(CONFIG, lr=0.5), data, finished[0], workers=0)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="no run of ours"):
        pretrain(CONFIG, data, tmp_path, workers=0)


def test_nothing_is_written_for_data_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/val/circle")
    with pytest.raises(InputError, match="different classes"):
        pretrain(CONFIG, tmp_path / "data", tmp_path / "output", workers=0)
    with pytest.raises(InputError, match="less than one batch"):
        pretrain(replace(CONFIG, batch_size=999), data, tmp_path / "output", workers=0)
    assert not (tmp_path / "output").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower --lr"):
        pretrain(replace(CONFIG, lr=1e30, threat_model=ThreatModel()), data, tmp_path / "run", workers=0)
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"schedule": "linear"},
        {"arch": "resnet51"},
        {"min_crop_scale": 0.0},
        {"val_resize": 16},
    ],
)
def test_what_is_no_recipe_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(CONFIG, **wrong)


def test_the_defaults_are_the_papers_recipe() -> None:
    """Salman et al. 2020, appendix A.1: SGD 0.1, momentum 0.9, decay 1e-4, batch 512, 90 epochs, PGD-3 of 2ε/3."""
    config = PretrainConfig()
    assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 1e-4)
    assert (config.batch_size, config.epochs, config.lr_step, config.image_size) == (512, 90, 30, 224)
    assert config.attack == AttackConfig(steps=3, relative_step_size=2 / 3, random_start=False)
