"""Pre-training runs: complete, reproducible, resumable anywhere, and never over another run."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robust_backbones.classification.train as training_module
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.format import save_tensors, sha256, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.config import Execution
from robust_backbones.classification.engine import Learner
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.classification.recipes import recipe
from robust_backbones.errors import DivergedError, InputError, PreemptedError, TrainingFailedError
from robust_backbones.models import BackboneSpec, build_backbone, fed_as
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.conftest import negatives

CONFIG = PretrainConfig(
    threat_model=ThreatModel("L2", 0.5),
    arch="resnet18",
    attack=AttackConfig(steps=1, random_start=True),
    eval_attack=AttackConfig(steps=1),
    epochs=3,
    batch_size=8,
    lr=0.01,
    schedule="one_cycle",
    image_size=32,
    val_resize=32,
)
HERE = Execution(device="cpu", workers=0, tensorboard=False, log_period=1)
STEPS = 4
"""Of an epoch: 32 images, 8 a step."""


class Tiny(nn.Module):
    """What stands for every architecture here: batch norm, dropout, a classifier; a step takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu()
        return self.fc(self.dropout(maps.mean((2, 3))))


def build_tiny(spec: BackboneSpec, *, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny()


@pytest.fixture(scope="module", autouse=True)
def tiny_networks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_backbones.classification.pretrain.build_backbone", build_tiny)
        yield


@pytest.fixture(scope="module")
def data(shapes: Path) -> Path:
    return shapes / "shapes_classification"


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, pretrain(CONFIG, data, output, replace(HERE, tensorboard=True))


def rows(output: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def same_checkpoints(first: Path, second: Path) -> bool:
    """The last network, the best one, and the last state of the training, byte by byte."""
    newest = max((second / "checkpoints").iterdir()).relative_to(second)
    return all(sha256(first / name) == sha256(second / name) for name in ("checkpoint.pt", "best.pt", newest))


def cut_off_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the run die at the beginning of its ``steps`` + 1-th step, as a kill does: without a last word."""
    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        if self.step_count == steps:
            raise KeyboardInterrupt
        original(self, batch)

    monkeypatch.setattr(Learner, "step", step)


def test_a_run_leaves_checkpoints_metrics_and_record(finished: tuple[Path, RunRecord]) -> None:
    output, record = finished
    size = {"image_size": 32, "val_resize": 32}  # as later evaluations and transfers see images, unless told otherwise
    assert record.backbone.items() >= size.items()
    assert RunRecord.read(output / "record.json") == record
    assert record.threat_model == "L2:0.5"
    assert record.config["eval_threat_model"] == "L2:0.5"
    assert record.config["processes"] == 1
    assert 0 <= record.metrics["robust_accuracy"] <= record.metrics["clean_accuracy"] <= 100
    metrics, steps = rows(output), rows(output, "steps")
    assert [row["epoch"] for row in metrics] == [1, 2, 3]
    assert [row["step"] for row in steps] == list(range(1, 3 * STEPS + 1))
    assert steps[0]["lr"] == pytest.approx(CONFIG.lr / 25)  # where one cycle begins
    assert all(row["epsilon"] == 0.5 for row in steps)
    assert metrics[-1]["clean_accuracy"] == record.metrics["clean_accuracy"]
    for epoch in (1, 2, 3):  # all steps are of equal size: an epoch's loss is their mean
        losses = [row["train_loss"] for row in steps if row["epoch"] == epoch]
        assert metrics[epoch - 1]["train_loss"] == pytest.approx(sum(losses) / STEPS)
    best = max(metrics, key=lambda row: row["robust_accuracy"])
    assert record.metrics["best/robust_accuracy"] == best["robust_accuracy"]
    for name in ("checkpoint.pt", "best.pt"):
        checkpoint = load_tensors(output / name)
        assert (checkpoint["spec"]["arch"], checkpoint["spec"]["num_classes"]) == ("resnet18", 4)
        assert checkpoint["threat_model"] == "L2:0.5"
        assert record.backbone[name.replace(".pt", "_sha256")] == sha256(output / name)
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "step_000000008.pt",
        "step_000000012.pt",
    ]
    with pytest.raises(InputError, match=r"give the checkpoint\.pt or best\.pt"):
        read_checkpoint(output / "checkpoints/step_000000012.pt")
    assert list((output / "tensorboard").glob("events.*"))
    assert not list(output.rglob(".*"))


@pytest.mark.parametrize(("steps", "workers"), [(1, 0), (4, 0), (6, 1), (11, 0)])
def test_a_run_cut_off_at_any_step_ends_the_same(
    finished: tuple[Path, RunRecord],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    workers: int,
) -> None:
    """Bit for bit: weights, metrics, and every row logged once."""
    output = tmp_path / "whole"
    execution = replace(HERE, checkpoint_minutes=0, workers=workers)
    cut_off_after(steps, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, output, execution)
    assert not (output / "record.json").exists()
    monkeypatch.undo()
    record = pretrain(CONFIG, data, output, execution)
    assert record.metrics == finished[1].metrics
    assert same_checkpoints(output, finished[0])
    for name in ("metrics", "steps"):
        ours, whole = ([{**row, "images_per_second": 0} for row in rows(o, name)] for o in (output, finished[0]))
        assert ours == whole


def test_a_run_between_checkpoints_repeats_steps_and_ends_the_same(
    finished: tuple[Path, RunRecord], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint an epoch, four minutes in the middle of the second are lost, and nothing else."""
    cut_off_after(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, tmp_path / "whole", HERE)
    monkeypatch.undo()
    pretrain(CONFIG, data, tmp_path / "whole", HERE)
    assert same_checkpoints(tmp_path / "whole", finished[0])
    assert [row["step"] for row in rows(tmp_path / "whole", "steps")] == list(range(1, 3 * STEPS + 1))


def test_an_older_checkpoint_is_resumed(
    finished: tuple[Path, RunRecord], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the rows that were logged, and the seconds."""
    output = tmp_path / "whole"
    cut_off_after(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, output, HERE)
    monkeypatch.undo()
    path = max((output / "checkpoints").iterdir())
    content = load_tensors(path)
    content["rows"] = {"metrics": rows(output), "steps": rows(output, "steps")[:STEPS]}
    content["progress"] |= {"seconds": 7000.0, "best": rows(output)[0]}
    save_tensors(path, content)
    for name in ("metrics.jsonl", "steps.jsonl", "seconds.json"):
        (output / name).unlink()
    record = pretrain(CONFIG, data, output, HERE)
    assert record.metrics == finished[1].metrics
    assert 7000 < record.seconds < 7100
    assert [row["step"] for row in rows(output, "steps")] == list(range(1, 3 * STEPS + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"objective": ObjectiveConfig("free", replays=2)},
        {"ema_decay": 0.9, "epsilon_warmup_epochs": 1.5},
        {"augmentation": "padded_crop", "objective": ObjectiveConfig("trades"), "image_size": 16},
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "warmup_epochs": 0.5,
            "mixup": 0.8,
            "cutmix": 1.0,
            "augmentation": "heavy",
        },
        {"progressive_size": 32, "progressive_epochs": 1, "image_size": 64, "val_resize": 64},
    ],
    ids=lambda change: "-".join(change),
)
def test_options_resume_as_well(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = replace(CONFIG, epochs=2, **change)
    pretrain(config, data, tmp_path / "whole", HERE)
    cut_off_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, data, tmp_path / "cut", replace(HERE, checkpoint_minutes=0))
    monkeypatch.undo()
    pretrain(config, data, tmp_path / "cut", HERE)
    assert same_checkpoints(tmp_path / "cut", tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(
    finished: tuple[Path, RunRecord],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "whole"
    cut_off_after(9, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, output, replace(HERE, checkpoint_minutes=0))
    monkeypatch.undo()
    newest = sorted((output / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    pretrain(CONFIG, data, output, HERE)
    assert "warning" in capsys.readouterr().out
    assert same_checkpoints(output, finished[0])

    (output / "record.json").unlink()
    for path in (output / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        pretrain(CONFIG, data, output, HERE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_asked_to_stop_says_so_and_resumes(
    finished: tuple[Path, RunRecord], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A scheduler's signal goes to all processes: the workers leave it to the main one."""
    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        original(self, batch)
        if self.step_count == 6:
            # By another process: from its parent, a worker of torch's takes it for the end of its work.
            pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
            time.sleep(0.5)  # for the end of a worker to be heard of

    monkeypatch.setattr(Learner, "step", step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=r"step_000000006\.pt, and the same command"):
        pretrain(CONFIG, data, tmp_path / "whole", replace(HERE, log_period=50, workers=workers))
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    pretrain(CONFIG, data, tmp_path / "whole", HERE)
    assert same_checkpoints(tmp_path / "whole", finished[0])


def test_a_run_cut_off_before_its_record_gets_one(finished: tuple[Path, RunRecord], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "whole"
    shutil.copytree(finished[0], output)
    (output / "record.json").unlink()
    assert pretrain(CONFIG, data, output, HERE).metrics == finished[1].metrics


def test_a_finished_run_is_not_run_again(finished: tuple[Path, RunRecord], data: Path) -> None:
    output, record = finished
    stamp = (output / "checkpoint.pt").stat().st_mtime_ns
    assert pretrain(CONFIG, data, output, HERE) == record
    assert (output / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_another_run_is_never_overwritten(finished: tuple[Path, RunRecord], data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another run \(lr is"):
        pretrain(replace(CONFIG, lr=0.5), data, finished[0], HERE)
    with pytest.raises(InputError, match=r"another run \(data_fingerprint.train is .*, data_fingerprint.val is"):
        pretrain(CONFIG, negatives(data, tmp_path / "other"), finished[0], HERE)
    more = shutil.copytree(data, tmp_path / "more" / data.name)
    for part in ("train", "val"):  # one image of a class that sorts last changes no other label
        last = max((more / part).iterdir())
        new = more / part / f"{last.name}_more"
        new.mkdir()
        shutil.copy(next(last.iterdir()), new)
    with pytest.raises(InputError, match=r"another run \(data_fingerprint.classes is"):
        pretrain(CONFIG, more, finished[0], HERE)
    moved = shutil.copytree(data, tmp_path / "moved" / data.name)
    assert pretrain(CONFIG, moved, finished[0], HERE) == finished[1]
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="no run of ours"):
        pretrain(CONFIG, data, tmp_path, HERE)


def test_nothing_is_written_for_what_cannot_be_run(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/val/circle")
    with pytest.raises(InputError, match="different classes"):
        pretrain(CONFIG, tmp_path / "data", tmp_path / "output", HERE)
    for part in ("train", "val"):  # as ImageNet's val is unpacked
        shutil.copytree(data / part / "circle", tmp_path / "one" / part / "images")
    with pytest.raises(InputError, match="one class, images, "):
        pretrain(CONFIG, tmp_path / "one", tmp_path / "output", HERE)
    for config, execution, message in (
        (replace(CONFIG, batch_size=999), HERE, "less than a batch"),
        (CONFIG, replace(HERE, micro_batch_size=3), "does not split"),
        (replace(CONFIG, cache_short_side=24), HERE, "give --cache"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(config, data, tmp_path / "output", execution)
    assert not (tmp_path / "output").exists()


def test_the_global_generator_is_left_as_it_was(data: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    pretrain(replace(CONFIG, epochs=1), data, tmp_path / "run", HERE)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_plan_keeps_the_learning_rate_apart_from_the_warning(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(replace(CONFIG, epochs=1, val_resize=64), data, tmp_path / "run", HERE)
    plan, warning = capsys.readouterr().out.splitlines()[:2]
    assert plan.endswith("learning rate 0.01 (the paper's 0.1 at batch 512 would scale to 0.00156 here)")
    assert warning.startswith("warning: validation sees 32 px")
    assert warning.endswith("as is usual")


def test_validation_images_that_are_trained_on_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stop nothing: a first trial may be so."""
    (tmp_path / "train").symlink_to(data / "train")
    (tmp_path / "val").symlink_to(data / "train")
    record = pretrain(replace(CONFIG, epochs=1), tmp_path, tmp_path / "run", HERE)
    assert record.metrics["clean_accuracy"] is not None
    told = f"warning: {tmp_path / 'val'} shares 32 images with {tmp_path / 'train'}, the first: "
    assert capsys.readouterr().out.count(told) == 1


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DivergedError, match=r"epoch 1/3: .* checkpoint is none; give a lower learning rate"):
        pretrain(replace(CONFIG, lr=1e30, threat_model=ThreatModel()), data, tmp_path / "run", HERE)
    assert not (tmp_path / "run/checkpoint.pt").exists()

    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        if self.step_count == 5:
            self.model.backbone.fc.weight.data.fill_(torch.nan)
        original(self, batch)

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(DivergedError, match=r"step 6 is not finite .* is .*step_000000004\.pt"):
        pretrain(CONFIG, data, tmp_path / "later", HERE)
    assert load_tensors(tmp_path / "later/checkpoints/step_000000004.pt")["progress"]["epoch"] == 1


def test_a_full_disk_leaves_the_previous_checkpoint(
    finished: tuple[Path, RunRecord], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses to let files grow beyond a size, in the middle of writing one."""
    output = tmp_path / "whole"
    cut_off_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, data, output, HERE)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in output.rglob("*.pt")}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(map(len, before.values())) // 2, limit[1]))
    try:
        with pytest.raises(TrainingFailedError, match=r"^cannot write .*; the last good checkpoint is .*000004\.pt$"):
            pretrain(CONFIG, data, output, replace(HERE, checkpoint_minutes=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in output.rglob("*.pt")} == before
    assert not list(output.rglob("*.tmp"))
    pretrain(CONFIG, data, output, HERE)
    assert same_checkpoints(output, finished[0])


def test_a_disk_that_is_full_at_once_is_told_in_one_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingFailedError, match=r"No space left on device\): make room") as error:
        pretrain(CONFIG, data, tmp_path / "run", HERE)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):  # for which no room helps
        pretrain(CONFIG, data, tmp_path / "run", HERE)


def test_an_unreadable_image_stops_the_run_or_is_listed(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    victim = sorted((folder / "train/circle").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(InputError, match=victim.name):
        pretrain(CONFIG, folder, tmp_path / "stopped", HERE)
    record = pretrain(replace(CONFIG, epochs=1), folder, tmp_path / "run", replace(HERE, skip_unreadable=True))
    assert record.config["skipped_images"] == 1
    skipped = json.loads((tmp_path / "run/skipped.json").read_text())
    assert list(skipped["train"]) == [f"circle/{victim.name}"]
    assert skipped["val"] == {}
    assert rows(tmp_path / "run", "steps")[-1]["step"] == 3  # 31 images, 8 a step


def test_the_best_epoch_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Robust accuracies 10, 30, 20: the second epoch's weights are the best, the third's the last."""
    accuracies = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(
        training_module, "evaluate", lambda *a, **k: {"clean_accuracy": 50.0, "robust_accuracy": next(accuracies)}
    )
    record = pretrain(CONFIG, data, tmp_path / "run", replace(HERE, keep_checkpoints=5))
    assert record.metrics["best/robust_accuracy"] == 30
    assert record.metrics["robust_accuracy"] == 20
    best = load_tensors(tmp_path / "run/best.pt")["state_dict"]
    second = load_tensors(tmp_path / "run/checkpoints/step_000000008.pt")["learner"]["model"]
    assert all(torch.equal(tensor, second[f"backbone.{name}"]) for name, tensor in best.items())


def test_averaged_weights_are_what_is_written(data: Path, tmp_path: Path) -> None:
    pretrain(replace(CONFIG, ema_decay=0.9, epochs=1), data, tmp_path / "run", HERE)
    state = load_tensors(sorted((tmp_path / "run/checkpoints").iterdir())[-1])["learner"]
    written = load_tensors(tmp_path / "run/checkpoint.pt")["state_dict"]["conv1.weight"]
    assert torch.equal(written, state["averaged"]["module.backbone.conv1.weight"])
    assert not torch.equal(written, state["model"]["backbone.conv1.weight"])


@pytest.mark.parametrize("classes", [4, 10])
def test_a_run_may_start_from_weights(
    classes: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of next to nothing they stay what they are; a classifier of as many classes is kept."""
    monkeypatch.setattr("robust_backbones.classification.pretrain.build_backbone", build_backbone)
    fed = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2), "channel_order": "BGR"}
    spec = BackboneSpec("resnet18", classes, **fed)
    given = build_backbone(spec, seed=7).state_dict()
    write_checkpoint(tmp_path / "start.pt", spec=spec, state_dict=given, threat_model=ThreatModel())
    config = replace(CONFIG, epochs=1, lr=1e-30, weight_decay=0.0)
    record = pretrain(config, data, tmp_path / "run", HERE, start_from=tmp_path / "start.pt")
    found = read_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (found.spec.channel_order, found.spec.mean) == ("RGB", (0.4, 0.4, 0.4))
    assert torch.equal(found.state_dict["layer4.1.conv2.weight"], given["layer4.1.conv2.weight"])
    assert torch.equal(found.state_dict["conv1.weight"], given["conv1.weight"].flip(1))
    assert found.state_dict["fc.weight"].shape == (4, 512)
    assert found.classes == tuple(sorted(folder.name for folder in (data / "train").iterdir()))
    assert (classes == 4) == torch.equal(found.state_dict["fc.weight"], given["fc.weight"][:4])
    assert record.backbone["start_sha256"] == sha256(tmp_path / "start.pt")
    with pytest.raises(InputError, match="another run"):
        pretrain(config, data, tmp_path / "run", HERE)
    with pytest.raises(InputError, match=r"start.pt holds a resnet18, not a resnet34: give --arch resnet18"):
        pretrain(replace(config, arch="resnet34"), data, tmp_path / "other", HERE, start_from=tmp_path / "start.pt")


@pytest.mark.parametrize("known", [(), ("0", "1", "2", "3"), "its own", "in another order", "of other data"])
def test_a_classifier_is_kept_for_its_own_classes(
    known: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of as many others its outputs mean nothing: one is drawn, and that is said."""
    monkeypatch.setattr("robust_backbones.classification.pretrain.build_backbone", build_backbone)
    own = tuple(sorted(folder.name for folder in (data / "train").iterdir()))
    names = {"its own": own, "in another order": own[::-1], "of other data": ("cat", *own[1:])}.get(known, known)
    spec = BackboneSpec("resnet18", 4)
    given = build_backbone(spec, seed=7).state_dict()
    write_checkpoint(tmp_path / "start.pt", spec=spec, state_dict=given, threat_model=None, classes=names)
    config = replace(CONFIG, epochs=1, lr=1e-30, weight_decay=0.0)
    pretrain(config, data, tmp_path / "run", HERE, start_from=tmp_path / "start.pt")
    found = read_checkpoint(tmp_path / "run/checkpoint.pt").state_dict
    kept, told = torch.equal(found["fc.weight"], given["fc.weight"]), capsys.readouterr().out
    assert kept == (known not in ("in another order", "of other data")) == ("a new classifier, because" not in told)
    drawn = build_backbone(spec, seed=config.seed).state_dict()["fc.weight"]
    assert kept or torch.equal(found["fc.weight"], drawn)


def test_reduced_images_are_cached_once(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, cache_short_side=24)
    first, second = (
        pretrain(config, data, tmp_path / name, replace(HERE, cache=tmp_path / "cache")) for name in ("a", "b")
    )
    assert first.metrics == second.metrics
    assert same_checkpoints(tmp_path / "a", tmp_path / "b")
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 48


def test_schedules_sizes_and_rates() -> None:
    config = replace(CONFIG, image_size=224, val_resize=256, progressive_size=128, progressive_epochs=3, epochs=5)
    assert [config.image_size_at(epoch) for epoch in range(5)] == [128, 160, 192, 224, 224]
    assert replace(CONFIG, lr=0.1, batch_size=256, lr_scaling="linear").learning_rate == pytest.approx(0.05)
    assert replace(CONFIG, lr=0.1, batch_size=256).learning_rate == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"seed": 2**63},
        {"lr": -1.0},
        {"schedule": "linear"},
        {"warmup_epochs": 1.0},
        {"warmup_epochs": 9.0, "schedule": "cosine"},
        {"optimizer": "adam"},
        {"beta2": 1.0},
        {"mixup": -1.0},
        {"arch": "resnet51"},
        {"arch": "vgg16_bn", "stem": "cifar"},
        {"min_crop_scale": 0.0},
        {"val_resize": 16},
        {"ema_decay": 1.0},
        {"augmentation": "mixup"},
        {"lr_scaling": "sqrt"},
        {"precision": "fp8"},
        {"progressive_size": 16},
        {"progressive_size": 64, "progressive_epochs": 2},
        {"epsilon_warmup_epochs": -1.0},
        {"epsilon_warmup_epochs": 91.0},
        {"schedule": "cosine", "warmup_epochs": 90.0},
    ],
)
def test_what_is_no_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"log_period": 0}, {"keep_checkpoints": 0}, {"compile": "default"}, {"device": "gpu"}]
)
def test_what_cannot_be_executed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(HERE, **wrong)


def test_one_of_several_gpus_can_be_compiled_for() -> None:
    assert Execution(device="cuda:1", compile="default").device == "cuda:1"


def test_the_defaults_are_the_papers_recipe() -> None:
    """Salman et al. 2020, appendix A.1: SGD 0.1, momentum 0.9, decay 1e-4, batch 512, 90 epochs, PGD-3 of 2ε/3."""
    config = PretrainConfig()
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.1, 0.9, 1e-4)
    assert (config.batch_size, config.epochs, config.lr_step) == (512, 90, 30)
    assert fed_as(config, BackboneSpec()).image_size == 224
    assert config.attack == AttackConfig(steps=3, relative_step_size=2 / 3, random_start=False)
    assert config.objective == ObjectiveConfig("pgd", label_smoothing=0)
    assert (config.ema_decay, config.epsilon_warmup_epochs, config.progressive_size) == (0, 0, 0)
    assert (config.precision, config.sync_batch_norm, config.stem) == ("fp32", False, "imagenet")


def test_every_published_backbone_has_its_recipe() -> None:
    for name, backbone in zoo.published().items():
        own = {"arch": backbone.arch, "threat_model": backbone.threat_model, "augmentation": "robustness"}
        assert recipe(name) == PretrainConfig(**own)
    assert len(zoo.published()) == 67
