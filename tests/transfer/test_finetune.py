"""Full-network transfer: plain PyTorch's result, a grid that is kept, and test images that select nothing."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.format import Checkpoint, sha256, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import Execution
from robust_backbones.classification.engine import Learner
from robust_backbones.data.batches import train_batches
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import train_transform, val_transform
from robust_backbones.errors import DivergedError, InputError, TrainingFailedError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, fed_as
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.config import TransferConfig
from robust_backbones.transfer.finetune import FinetuneConfig, full_finetune
from tests.conftest import run_in_ranks
from tests.transfer.conftest import NarrowResNet

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
CONFIG = FinetuneConfig(
    epochs=2,
    batch_size=8,
    lr=9.0,  # the grid sets these
    weight_decay=9.0,
    eval_period=2,
    image_size=32,
    val_resize=32,
    attack=AttackConfig(steps=1),
    eval_attack=AttackConfig(steps=1, relative_step_size=1),
)
SHORT = replace(CONFIG, epochs=1)
GRID = TransferConfig(lrs=(0.01, 0.001), seeds=(0, 1))
ONE = TransferConfig(lrs=(0.01,), seeds=(0,))
HERE = Execution(device="cpu", workers=0, tensorboard=False, log_period=1)
STEPS, STEPS_SELECTING = 8, 6
"""Of a run: two epochs of 8 images a class, 8 a step; of one that selects, without 2 of each class."""


@pytest.fixture(scope="module")
def folder(shapes: Path) -> Path:
    return shapes / "shapes_classification"


def opened(folder: Path, metric: str = "") -> TransferData:
    return open_transfer_data(str(folder), None, metric=metric)


def weights(run: Path) -> dict[str, Tensor]:
    return read_checkpoint(run / "checkpoint.pt").state_dict


def runs(output: Path) -> set[str]:
    return {path.name for path in (output / "robust/runs").iterdir()}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of all learners, as they come."""
    taken: list[str] = []
    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        taken.append("step")
        original(self, batch)

    monkeypatch.setattr(Learner, "step", step)
    return taken


@pytest.fixture(scope="module")
def grid_run(
    checkpoint: Checkpoint, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[RunRecord]]:
    output = tmp_path_factory.mktemp("finetune") / "whole"
    return output, full_finetune({"robust": checkpoint}, opened(folder), output, GRID, CONFIG, HERE)


def essence(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """All of the records but how long they took, and at which commit, which may be another between two runs."""
    return [{**record.__dict__, "seconds": 0, "git_commit": ""} for record in records]


# --- what is learnt --------------------------------------------------------------------------------------------------


def pixels_of(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def plainly(checkpoint: Checkpoint, folder: Path, *, freeze: int, decay: float, seed: int) -> tuple[nn.Module, float]:
    """Two epochs of plain PyTorch, a tenth of the rate in the second; the network and its accuracy on val, 0-100."""
    net = NarrowResNet(num_classes=4)
    net.load_state_dict(checkpoint.state_dict)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.fc = NarrowResNet(num_classes=4).fc
    groups = [[net.conv1, net.bn1], [net.layer1], [net.layer2], [net.layer3], [net.layer4], [net.fc]]
    frozen = [module for group in groups[:freeze] for module in group]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for module in group for p in module.parameters()], "lr": 0.01 * decay ** (5 - depth)}
            for depth, group in enumerate(groups)
            if depth >= freeze
        ],
        momentum=0.9,
        weight_decay=5e-4,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    data = open_dataset(folder / "train", train_transform(32, min_crop_scale=0.08), seed=seed)
    for epoch in range(2):
        net.train()
        for module in frozen:
            module.eval()
        for images, labels in train_batches(data, batch_size=8, micro_batch_size=8, epoch=epoch, workers=0):
            optimizer.zero_grad()
            F.cross_entropy(net(pixels_of(images)), labels).backward()
            optimizer.step()
        scheduler.step()
    test = open_dataset(folder / "val", val_transform(32, resize=32))
    net.eval()
    with torch.no_grad():
        right = [int(net(pixels_of(image)[None]).argmax()) == label for image, label in test]
    return net, 100 * sum(right) / len(right)


@pytest.mark.parametrize(("freeze", "decay", "seed"), [(0, 1.0, 0), (2, 0.5, 3)])
def test_two_epochs_are_those_of_plain_pytorch(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, freeze: int, decay: float, seed: int
) -> None:
    config = replace(CONFIG, lr_step=1, freeze=freeze, layer_decay=decay)
    grid = replace(ONE, seeds=(seed,))
    (record,) = full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", grid, config, HERE)
    net, accuracy = plainly(checkpoint, folder, freeze=freeze, decay=decay, seed=seed)
    ours = weights(tmp_path / "run/robust/runs" / record.config["run"])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
        moved = not torch.equal(tensor, checkpoint.state_dict[name])
        assert moved == (not freeze or not name.startswith(("conv1", "bn1", "layer1")))
    assert record.metrics == {"clean_accuracy": accuracy, "robust_accuracy": accuracy}


@pytest.mark.slow
def test_adversarial_fine_tuning_learns_something_else_and_is_measured(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    """The robust accuracy is that of one step of ε = 2 up the gradient, taken here by hand."""
    data = opened(folder)
    config = replace(SHORT, eval_threat_model=ThreatModel("L2", 2))
    kinds = {"standard": config, "adversarial": replace(config, threat_model=ThreatModel("L2", 0.25))}
    learnt = {}
    for kind, config in kinds.items():
        (record,) = full_finetune({"robust": checkpoint}, data, tmp_path / kind, ONE, config, HERE)
        written = read_checkpoint(tmp_path / kind / "robust/runs" / record.config["run"] / "checkpoint.pt")
        net, learnt[kind] = written.build(), written.state_dict
        right, still_right = 0, 0
        for image, label in open_dataset(folder / "val", val_transform(32, resize=32)):
            clean = (image[None].float() / 255).requires_grad_()
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            logits = net((clean - mean) / std)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), clean)
            attacked = (clean + 2 * gradient / gradient.norm()).clamp(0, 1)
            is_right = int(logits.argmax()) == label
            right += is_right
            still_right += is_right and int(net((attacked - mean) / std).argmax()) == label
        assert record.metrics == {
            "clean_accuracy": pytest.approx(100 * right / 16),
            "robust_accuracy": pytest.approx(100 * still_right / 16),
        }
        assert record.config["eval_threat_model"] == "L2:2"
        assert record.config["threat_model"] == ("L2:0.25" if kind == "adversarial" else "L2:0")
        assert record.threat_model == "L2:0.25"  # of pre-training
        assert still_right < right  # an attack that does nothing would show
    assert not torch.equal(learnt["standard"]["conv1.weight"], learnt["adversarial"]["conv1.weight"])


def test_with_every_group_frozen_only_the_classifier_changes(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    config = replace(SHORT, freeze=5, threat_model=ThreatModel("L2", 0.25))  # the attack leaves no trace either
    (record,) = full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", ONE, config, HERE)
    ours = weights(tmp_path / "run/robust/runs" / record.config["run"])
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, checkpoint.state_dict[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_classifier_may_have_more_outputs_and_the_classes_fewer_images(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    original = ClassificationDataset.load

    def load(self: ClassificationDataset, position: int) -> Tensor:
        read.append((self._source.root.name, self.names[position]))
        return original(self, position)

    monkeypatch.setattr(ClassificationDataset, "load", load)
    data, config = opened(folder), replace(SHORT, batch_size=4)
    chosen = {}
    for name, change in {"zero": {}, "seed": {"seeds": (1,)}, "data_seed": {"data_seed": 1}}.items():
        grid = replace(ONE, images_per_class=3, num_outputs=57, **change)
        read.clear()
        (record,) = full_finetune({"robust": checkpoint}, data, tmp_path / name, grid, config, HERE)
        trained_on = {image for part, image in read if part == "train"}
        assert len(read) == 12 + 16
        by_class = [image.split("/")[0] for image in trained_on]
        assert {label: by_class.count(label) for label in by_class} == dict.fromkeys(data.train.classes, 3)
        chosen[name] = trained_on
        written = read_checkpoint(tmp_path / name / "robust/runs" / record.config["run"] / "checkpoint.pt")
        assert (written.spec.num_classes, written.state_dict["fc.weight"].shape) == (57, (57, 64))
    assert chosen["zero"] == chosen["seed"] != chosen["data_seed"]


def test_the_metric_counts_classes_or_images(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """Of four classes with 4, 4, 1 and 2 test images; the third one's is of another shape, which is hard."""
    unbalanced = tmp_path / "unbalanced"
    shutil.copytree(folder, unbalanced)
    classes = sorted(path.name for path in (unbalanced / "val").iterdir())
    for name, keep in ((classes[2], 1), (classes[3], 2)):
        for path in sorted((unbalanced / "val" / name).iterdir())[keep:]:
            path.unlink()
    (lonely,) = (unbalanced / "val" / classes[2]).iterdir()
    shutil.copy(sorted((unbalanced / "val" / classes[0]).iterdir())[0], lonely)
    measured = {}
    for metric in ("top1", "mean_per_class"):
        output = tmp_path / metric
        (record,) = full_finetune({"robust": checkpoint}, opened(unbalanced, metric), output, ONE, SHORT, HERE)
        assert record.config["metric"] == metric
        measured[metric] = record.metrics["clean_accuracy"]
    net = read_checkpoint(output / "robust/runs" / record.config["run"] / "checkpoint.pt").build()
    right: dict[int, list[bool]] = {label: [] for label in range(4)}
    with torch.no_grad():
        for image, label in open_dataset(unbalanced / "val", val_transform(32, resize=32)):
            right[label].append(int(net(pixels_of(image)[None]).argmax()) == label)
    shares = [sum(found) / len(found) for found in right.values()]
    assert [len(found) for found in right.values()] == [4, 4, 1, 2]
    assert measured["mean_per_class"] == pytest.approx(100 * sum(shares) / 4)
    assert measured["top1"] == pytest.approx(100 * sum(map(sum, right.values())) / 11)
    assert measured["top1"] != measured["mean_per_class"]


def test_the_defaults_are_the_papers_recipe() -> None:
    """Salman et al. 2020, appendix A: SGD, 150 epochs, a tenth of the rate every 50, batch 64, momentum, decay 5e-4."""
    config, grid = FinetuneConfig(), TransferConfig()
    assert (config.epochs, config.lr_step, config.batch_size) == (150, 50, 64)
    assert (config.momentum, config.weight_decay, config.threat_model.epsilon) == (0.9, 5e-4, 0)
    assert (config.freeze, config.layer_decay, fed_as(config, BackboneSpec()).image_size) == (0, 1, 224)
    assert (grid.lrs, grid.weight_decays, len(grid.seeds)) == ((0.01, 0.001), (5e-4,), 3)
    assert grid.select_on == "held_out"  # which is not the paper's


@pytest.mark.parametrize("wrong", [{"freeze": 6}, {"freeze": -1}, {"layer_decay": 0.0}, {"layer_decay": 1.5}])
def test_what_is_no_recipe_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is a .*, got"):
        replace(CONFIG, **wrong)


# --- the grid --------------------------------------------------------------------------------------------------------


def test_held_out_images_select_by_one_run_a_setting(grid_run: tuple[Path, list[RunRecord]]) -> None:
    output, records = grid_run
    names = ["lr0.01_wd0.0005", "lr0.001_wd0.0005"]
    held_out = {name: RunRecord.read(output / f"robust/runs/{name}_held_out_seed0/record.json") for name in names}
    scores = {name: record.metrics["clean_accuracy"] for name, record in held_out.items()}
    selected = max(names, key=lambda name: scores[name])  # of equal ones the first
    assert runs(output) == {
        *(f"{name}_held_out_seed0" for name in names),
        *(f"{selected}_test_seed{seed}" for seed in (0, 1)),
    }
    for seed, record in enumerate(records):
        assert record == RunRecord.read(output / f"robust/seed_{seed}/record.json")
        run = RunRecord.read(output / f"robust/runs/{selected}_test_seed{seed}/record.json")
        assert record.metrics == run.metrics
        assert record.seconds == run.seconds
        assert (record.task, record.run_id, record.seed) == ("transfer", f"robust/seed_{seed}", seed)
        assert (record.dataset, record.threat_model) == ("shapes_classification", "L2:0.25")
        assert record.backbone["label"] == "robust"
        assert record.config["mode"] == "full_network"
        assert record.config["lr"] == (0.01 if selected == names[0] else 0.001)
        assert record.config["seed"] == seed
        assert record.config["selection"] == {
            "selected": selected,
            "on": "held_out",
            "scores": {name: [score] for name, score in scores.items()},
        }
    for name, lr in zip(names, (0.01, 0.001), strict=True):
        assert (held_out[name].config["lr"], held_out[name].config["weight_decay"]) == (lr, 5e-4)
        rows = (output / f"robust/runs/{name}_held_out_seed0/steps.jsonl").read_text().splitlines()
        assert len(rows) == STEPS_SELECTING
        assert {json.loads(row)["lr"] for row in rows} == {lr}
    rows = (output / f"robust/runs/{selected}_test_seed0/steps.jsonl").read_text().splitlines()
    assert len(rows) == STEPS
    # Which epoch is best would be seen on the images that give the result.
    assert not list(output.rglob("best.pt"))


def test_finished_runs_are_not_run_again(
    grid_run: tuple[Path, list[RunRecord]], checkpoint: Checkpoint, folder: Path, steps: list[str]
) -> None:
    output, records = grid_run
    again = full_finetune({"robust": checkpoint}, opened(folder), output, GRID, CONFIG, HERE)
    assert essence(again) == essence(records)
    assert [record.seconds for record in again] == [record.seconds for record in records]
    assert not steps


def test_a_grid_cut_off_in_the_second_run_ends_the_same(
    grid_run: tuple[Path, list[RunRecord]],
    checkpoint: Checkpoint,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit; of the first run nothing is done again, of the second the steps after its first epoch."""
    taken = []
    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        if len(taken) == STEPS_SELECTING + 4:
            raise KeyboardInterrupt
        taken.append(self.step_count)
        original(self, batch)

    output, grid = tmp_path / "whole", replace(GRID, seeds=(0,))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        with pytest.raises(KeyboardInterrupt):
            full_finetune({"robust": checkpoint}, opened(folder), output, grid, CONFIG, HERE)
    finished = list(output.rglob("record.json"))
    assert [path.parent.name for path in finished] == ["lr0.01_wd0.0005_held_out_seed0"]
    stamp = finished[0].stat().st_mtime_ns

    rest = []

    def note(self: Learner, batch: Any) -> None:
        rest.append(self.step_count)
        original(self, batch)

    monkeypatch.setattr(Learner, "step", note)
    (record,) = full_finetune({"robust": checkpoint}, opened(folder), output, grid, CONFIG, HERE)
    assert rest == [*range(3, STEPS_SELECTING), *range(STEPS)]
    assert finished[0].stat().st_mtime_ns == stamp
    (unbroken,) = essence(grid_run[1][:1])
    assert essence([record]) == [{**unbroken, "config": {**unbroken["config"], "seeds": [0]}}]
    assert len(runs(output)) == 3
    for path in output.rglob("*.pt"):
        assert sha256(path) == sha256(grid_run[0] / path.relative_to(output)), path


def test_a_setting_that_diverges_is_out(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    grid = replace(ONE, lrs=(1e6, 0.001))
    (record,) = full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", grid, SHORT, HERE)
    selection = record.config["selection"]
    assert selection["selected"] == "lr0.001_wd0.0005"
    assert selection["scores"]["lr1e+06_wd0.0005"] == [None]
    assert selection["scores"]["lr0.001_wd0.0005"] != [None]
    json.loads((tmp_path / "run/robust/seed_0/record.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_with_every_setting_out_nothing_is_chosen(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    grid = replace(ONE, lrs=(1e6, 1e7))
    with pytest.raises(TrainingFailedError, match="every setting of the grid diverged") as error:
        full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", grid, SHORT, HERE)
    assert error.value.exit_status == 1
    assert "\n" not in str(error.value)
    with pytest.raises(DivergedError) as alone:
        full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "one", replace(ONE, lrs=(1e6,)), SHORT, HERE)
    assert alone.value.exit_status == 1


def test_where_test_images_select_every_setting_has_every_trial(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, steps: list[str]
) -> None:
    grid, output = replace(GRID, select_on="test"), tmp_path / "run"
    records = full_finetune({"robust": checkpoint}, opened(folder), output, grid, SHORT, HERE)
    assert len(steps) == 4 * STEPS / 2  # on all images: nothing is held out
    names = ["lr0.01_wd0.0005", "lr0.001_wd0.0005"]
    assert runs(output) == {f"{name}_test_seed{seed}" for name in names for seed in (0, 1)}
    found = {
        name: [
            RunRecord.read(output / f"robust/runs/{name}_test_seed{seed}/record.json").metrics["clean_accuracy"]
            for seed in (0, 1)
        ]
        for name in names
    }
    selected = max(names, key=lambda name: sum(found[name]) / 2)
    for seed, record in enumerate(records):
        assert record.config["selection"] == {"selected": selected, "on": "test", "scores": found}
        assert record.metrics["clean_accuracy"] == found[selected][seed]


def test_a_single_setting_needs_no_selection(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, steps: list[str]
) -> None:
    records = full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", ONE, SHORT, HERE)
    assert runs(tmp_path / "run") == {"lr0.01_wd0.0005_test_seed0"}
    assert records[0].config["selection"] == {"selected": "lr0.01_wd0.0005", "on": "nothing", "scores": {}}
    assert len(steps) == STEPS / 2


# --- test images -----------------------------------------------------------------------------------------------------


def test_test_images_have_no_part_in_what_is_chosen_and_learnt(
    grid_run: tuple[Path, list[RunRecord]], checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    """With noise in their place, selection and weights are bit-identical, and the result is another."""
    noisy = tmp_path / folder.name
    shutil.copytree(folder, noisy)
    rng = np.random.default_rng(0)
    for path in (noisy / "val").rglob("*.*"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    output = tmp_path / "run"
    (record,) = full_finetune({"robust": checkpoint}, opened(noisy), output, replace(GRID, seeds=(0,)), CONFIG, HERE)
    assert len(runs(output)) == 3
    for path in output.rglob("*.pt"):
        assert sha256(path) == sha256(grid_run[0] / path.relative_to(output)), path
    assert record.config["selection"] == grid_run[1][0].config["selection"]
    assert record.metrics != grid_run[1][0].metrics


def test_no_test_image_is_read_before_the_last_evaluation(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ClassificationDataset.load

    def load(self: ClassificationDataset, position: int) -> Tensor:
        steps.append(self._source.root.name)
        return original(self, position)

    monkeypatch.setattr(ClassificationDataset, "load", load)
    grid = replace(GRID, seeds=(0,))
    full_finetune({"robust": checkpoint}, opened(folder), tmp_path / "run", grid, SHORT, HERE)
    first = steps.index("val")
    assert set(steps[:first]) == {"train", "step"}
    assert steps[first:] == ["val"] * 16
    assert steps.count("step") == (2 * STEPS_SELECTING + STEPS) / 2
    assert steps.count("train") == 2 * (24 + 8) + 32


# --- images that cannot be read, folders that hold something else ----------------------------------------------------


def test_unreadable_images_stop_the_run_or_are_listed(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path, steps: list[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    victims = {part: sorted((damaged / part / "circle").iterdir())[0] for part in ("train", "val")}
    for path in victims.values():
        path.write_bytes(path.read_bytes()[:200])

    def start(name: str, execution: Execution) -> list[RunRecord]:
        return full_finetune({"robust": checkpoint}, opened(damaged), tmp_path / name, ONE, SHORT, execution)

    with pytest.raises(InputError, match=rf"^cannot read the image circle/{victims['train'].name} \(") as error:
        start("stopped", HERE)
    assert "\n" not in str(error.value)

    (record,) = start("run", replace(HERE, skip_unreadable=True))
    skipped = json.loads((tmp_path / "run/skipped.json").read_text())
    assert {part: list(found) for part, found in skipped.items()} == {
        "train": [f"circle/{victims['train'].name}"],
        "test": [f"circle/{victims['val'].name}"],
    }
    assert all(reason for found in skipped.values() for reason in found.values())
    accuracy = record.metrics["clean_accuracy"]
    assert accuracy == pytest.approx(100 * round(accuracy * 15 / 100) / 15)  # of 15 images
    rows = (tmp_path / "run/robust/runs" / record.config["run"] / "steps.jsonl").read_text().splitlines()
    assert len(rows) == 3  # of 31 images, 8 a step
    # The list of the first start holds, and the same command finds its run.
    steps.clear()
    assert essence(start("run", replace(HERE, skip_unreadable=True))) == essence([record])
    assert not steps


def test_the_folder_of_another_experiment_is_refused(
    grid_run: tuple[Path, list[RunRecord]], checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    output, data = grid_run[0], opened(folder)
    other = replace(checkpoint, source_sha256="0" * 64)
    for grid, config, label, backbone, differs in (
        (replace(GRID, lrs=(0.1, 0.01)), CONFIG, "robust", checkpoint, "lrs"),
        (replace(GRID, held_out=0.5), CONFIG, "robust", checkpoint, "held_out"),
        (GRID, replace(CONFIG, freeze=1), "robust", checkpoint, "freeze"),
        (GRID, CONFIG, "robust", other, "checkpoints"),
        (GRID, CONFIG, "standard", checkpoint, "checkpoints"),
    ):
        with pytest.raises(InputError, match=rf"holds another run \({differs}"):
            full_finetune({label: backbone}, data, output, grid, config, HERE)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no run of ours"):
        full_finetune({"robust": checkpoint}, data, tmp_path, GRID, CONFIG, HERE)


def test_nothing_is_written_for_what_cannot_be_run(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    output, data = tmp_path / "run", opened(folder)
    for grid, config, execution, message in (
        (replace(ONE, num_outputs=3), CONFIG, HERE, "4 classes, more than 3 outputs"),
        (GRID, replace(CONFIG, batch_size=25), HERE, "24 images to train on, less than a batch"),
        (replace(GRID, images_per_class=1), CONFIG, HERE, "one training image a class"),
        *([] if torch.cuda.is_available() else [(ONE, CONFIG, replace(HERE, device="cuda"), "no CUDA device")]),
    ):
        with pytest.raises(InputError, match=message):
            full_finetune({"robust": checkpoint}, data, output, grid, config, execution)
        assert not output.exists()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_finish_and_give_each_record_once(folder: Path, tmp_path: Path, narrow_resnet18: None) -> None:
    """The command itself; an image that cannot be read is found by one process and left out by both."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    victim = sorted((damaged / "train/circle").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:200])
    output, file = tmp_path / "run", tmp_path / "robust.pt"
    write_checkpoint(file, spec=BackboneSpec("resnet18", 4), state_dict=NarrowResNet(4).state_dict(), threat_model=None)
    recipe = (
        "--epochs 1 --batch-size 8 --image-size 32 --val-resize 32 --lrs 0.01 1e6 --seeds 0 1 --eval-threat-model L2:1 "
        "--eval-attack.steps 1 --device cpu --workers 0 --no-tensorboard --skip-unreadable"
    )
    options = (damaged, file, "--output", output, *recipe.split())
    said = run_in_ranks(tmp_path / "said", 2, "transfer", "finetune", *options)
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("record.json"))
    assert found == [
        "robust/runs/lr0.01_wd0.0005_held_out_seed0/record.json",
        "robust/runs/lr0.01_wd0.0005_test_seed0/record.json",
        "robust/runs/lr0.01_wd0.0005_test_seed1/record.json",
        "robust/seed_0/record.json",
        "robust/seed_1/record.json",
    ]
    record = RunRecord.read(output / "robust/seed_1/record.json")
    assert (record.config["processes"], record.config["micro_batch_size"]) == (2, 4)
    assert record.config["selection"]["scores"]["lr1e+06_wd0.0005"] == [None]
    assert list(json.loads((output / "skipped.json").read_text())["train"]) == [f"circle/{victim.name}"]
    assert 0 <= record.metrics["robust_accuracy"] <= record.metrics["clean_accuracy"] <= 100
    for seed in (0, 1):
        run = output / f"robust/runs/lr0.01_wd0.0005_test_seed{seed}"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1]
    for line in ("selected on held_out", "is out"):
        assert sum(line in text for text in said.splitlines()) == 1
