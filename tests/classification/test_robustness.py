"""Robust accuracy against linear models, where it is known, against another AutoPGD, and through every interruption."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust_backbones.classification.robustness as robustness
from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.robustness import (
    ENSEMBLE,
    STAGES,
    RobustnessConfig,
    attack_batch,
    check_classes,
    evaluate_robustness,
    wilson_interval,
)
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.conftest import negatives
from tests.transfer.conftest import narrow_resnet18  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

CPU = Compute(torch.device("cpu"))
PGD = AttackConfig(steps=20, relative_step_size=0.25, random_start=True)


def outcomes_of(model: nn.Module, images: Tensor, labels: Tensor, config: RobustnessConfig) -> dict[str, Tensor | None]:
    return attack_batch(model, images, labels, config, Compute(torch.device("cpu"), config.precision), seed=0)


# --- linear models: an image is robust exactly if its margin over each class exceeds epsilon times the dual norm


def linear_task(norm: str, classes: int) -> tuple[nn.Module, Tensor, Tensor, float, Tensor]:
    """A linear model, images, labels (some wrong), an epsilon, and which images are robust to it.

    The images stay so far from 0 and 1 that clipping never helps the defender; epsilon lies in the middle of the widest
    gap between the central images' radii, so that no outcome hangs on the last digits.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        images = 0.4 + 0.2 * torch.rand(64, 3, 8, 8, generator=generator)
        logits = model(images)
    labels = logits.argmax(1)
    labels[::16] = (labels[::16] + 1) % classes
    weight = model[1].weight.detach()
    margins = logits[torch.arange(64), labels][:, None] - logits
    dual = (weight[labels][:, None] - weight).norm(p=1 if norm == "Linf" else 2, dim=2)
    radii = (margins / dual).nan_to_num(nan=math.inf).amin(1)  # 0 / 0 for the label itself
    candidates = radii.sort().values[20:44]
    widest = int(candidates.diff().argmax())
    epsilon = float(candidates[widest : widest + 2].mean())
    assert epsilon < 0.4
    return model, images, labels, epsilon, radii > epsilon


@pytest.mark.parametrize(("norm", "classes"), [("Linf", 2), ("Linf", 12), ("L2", 2), ("L2", 4)])
def test_the_optimum_of_a_linear_model_is_reached(norm: str, classes: int) -> None:
    """12 classes are more than APGD-T aims at; 2 and 3 are too few for its loss."""
    model, images, labels, epsilon, robust = linear_task(norm, classes)
    config = RobustnessConfig(ThreatModel(norm, epsilon), attack=PGD, square_queries=100)
    # Channels last, as images come from the engine: the library by itself fails on them.
    outcomes = outcomes_of(model, images.contiguous(memory_format=torch.channels_last), labels, config)
    assert torch.equal(outcomes["clean"], model(images).argmax(1) == labels)
    assert 0 < robust.sum() < outcomes["clean"].sum() < len(labels)
    for stage in STAGES:
        if stage == "apgd-t" and classes < 4:
            assert outcomes[stage] is None
        else:
            assert not (robust & ~outcomes[stage]).any(), f"{stage} broke an image that cannot be broken"
    # With two classes cross-entropy has one way up; with more it may climb to a class that is not the nearest.
    exact = ("pgd", "apgd-ce", "square") if classes == 2 else ("apgd-t", "square") if classes > 3 else ()
    for stage in exact:
        assert torch.equal(outcomes[stage], robust), stage


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_t_aims_at_every_class(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes 1 to 4 are likelier than class 5, but no perturbation changes their distance from class 0."""
    monkeypatch.setattr(robustness, "ENSEMBLE", ("apgd-t",))
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6)), torch.full((4, 3, 8, 8), 0.5)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[5].normal_(generator=torch.Generator().manual_seed(0))
        model[1].bias.copy_(torch.tensor([0, -0.1, -0.2, -0.3, -0.4, -1 - 0.5 * float(model[1].weight[5].sum())]))
    radius = 1 / float(model[1].weight[5].detach().norm(p=1 if norm == "Linf" else 2))
    for share, robust in ((0.98, True), (1.02, False)):
        config = RobustnessConfig(ThreatModel(norm, share * radius))
        outcomes = outcomes_of(model, images, torch.zeros(4, dtype=torch.long), config)
        assert outcomes["clean"].all()
        assert outcomes["apgd-t"].tolist() == [robust] * 4


# --- a trained network


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Faint class patterns under noise, four classes; images in [0, 1] of shape (count, 3, 16, 16)."""
    templates = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(99)) - 0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return (0.5 + 0.25 * templates[labels] + 0.15 * noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 36, 4),
        )
    images, labels = patterns(1024, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(80):
        part = slice(64 * (step % 16), 64 * (step % 16) + 64)
        optimizer.zero_grad()
        adversarial = pgd(model, images[part], labels[part], ThreatModel("Linf", 6 / 255), AttackConfig(steps=2))
        F.cross_entropy(model(adversarial), labels[part]).backward()
        optimizer.step()
    return model.eval()


EPSILONS = {"Linf": 7 / 255, "L2": 0.5}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_agrees_with_another_implementation(
    network: nn.Module, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchattacks, another seed: within half a point on 400 images, which is two images."""
    torchattacks = pytest.importorskip("torchattacks")
    monkeypatch.setattr(robustness, "ENSEMBLE", ("apgd-ce",))
    images, labels = patterns(400, seed=2)
    threat_model = ThreatModel(norm, EPSILONS[norm])
    ours = outcomes_of(network, images, labels, RobustnessConfig(threat_model, attack=PGD, apgd_steps=50))
    with torch.random.fork_rng(devices=[]):
        attack = torchattacks.APGD(network, norm=norm, eps=threat_model.epsilon, steps=50, seed=1)
        theirs = (network(images).argmax(1) == labels) & (network(attack(images, labels)).argmax(1) == labels)
    assert 100 < theirs.sum() < 300  # neither all nor nothing: the comparison tells something
    assert abs(int(ours["apgd-ce"].sum()) - int(theirs.sum())) <= 2


@pytest.mark.parametrize(("norm", "precision"), [("Linf", "fp32"), ("L2", "bf16")])
def test_no_stage_gives_an_image_back(network: nn.Module, norm: str, precision: str) -> None:
    images, labels = patterns(64, seed=3)
    config = RobustnessConfig(ThreatModel(norm, EPSILONS[norm]), attack=PGD, apgd_steps=20, square_queries=200)
    outcomes = outcomes_of(network, images, labels, replace(config, precision=precision))
    assert not (outcomes["pgd"] & ~outcomes["clean"]).any()
    previous = outcomes["clean"]
    for stage in ENSEMBLE:
        assert not (outcomes[stage] & ~previous).any(), stage
        previous = outcomes[stage]


def test_more_restarts_break_at_least_the_same_images(network: nn.Module) -> None:
    images, labels = patterns(64, seed=4)
    # One small step leaves the outcome to the start.
    config = RobustnessConfig(ThreatModel("Linf", 24 / 255), attack=replace(PGD, steps=1), autoattack=False)
    once = outcomes_of(network, images, labels, config)["pgd"]
    often = outcomes_of(network, images, labels, replace(config, attack=replace(config.attack, restarts=8)))["pgd"]
    assert not (often & ~once).any()
    assert often.sum() < once.sum()


def test_more_steps_break_more_images(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = patterns(64, seed=4)
    for stage in ("apgd-ce", "apgd-t"):
        monkeypatch.setattr(robustness, "ENSEMBLE", (stage,))
        config = RobustnessConfig(ThreatModel("Linf", 8 / 255))
        few, many = (outcomes_of(network, images, labels, replace(config, apgd_steps=steps)) for steps in (1, 30))
        assert many[stage].sum() < 0.8 * few[stage].sum()


def test_each_attack_sees_only_the_survivors(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = patterns(64, seed=5)
    seen = {}
    library_attack = robustness._library_attack

    def counted(stage: str, *arguments: Any) -> robustness.Attack:
        attack = library_attack(stage, *arguments)

        def run(images: Tensor, labels: Tensor) -> Tensor:
            seen[stage] = len(images)
            return attack(images, labels)

        return run

    monkeypatch.setattr(robustness, "_library_attack", counted)
    config = RobustnessConfig(ThreatModel("Linf", 7 / 255), attack=PGD, apgd_steps=10, square_queries=10)
    outcomes = outcomes_of(network, images, labels, config)
    assert seen == {
        "apgd-ce": outcomes["clean"].sum(),
        "apgd-t": outcomes["apgd-ce"].sum(),
        "square": outcomes["apgd-t"].sum(),
    }


def test_nothing_outside_changes(small_model: NormalizedModel, images: Tensor) -> None:
    """The library seeds the global generators; batch norms would learn from attacks in train mode."""
    torch.manual_seed(7)
    before, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in small_model.state_dict().items()}
    labels = small_model.eval()(images).argmax(1)
    small_model.train()
    config = RobustnessConfig(ThreatModel("L2", 0.5), attack=PGD, apgd_steps=2, square_queries=2)
    outcomes_of(small_model, images, labels, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in small_model.state_dict().items())
    assert small_model.training
    assert all(parameter.requires_grad for parameter in small_model.parameters())


def test_at_epsilon_zero_all_is_clean(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> robustness.Attack:
        return lambda images, labels: pytest.fail("an attack ran")

    monkeypatch.setattr(robustness, "_library_attack", never)
    images, labels = patterns(64, seed=6)
    outcomes = outcomes_of(network, images, labels, RobustnessConfig(ThreatModel("L2", 0)))
    assert all(torch.equal(outcomes[stage], outcomes["clean"]) for stage in STAGES)


@pytest.mark.parametrize("stage", ["pgd", "apgd-t"])
@pytest.mark.parametrize(
    "cheat",
    [
        lambda images: images + 0.0101,
        lambda images: torch.full_like(images, math.nan),
        lambda images: images - images.amin() - 1e-4,  # well within the ball, yet below 0
    ],
)
def test_a_point_outside_is_never_counted(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, stage: str, cheat: Callable[[Tensor], Tensor]
) -> None:
    images, labels = patterns(16, seed=7)
    images = images.clamp(0.001, 0.9)
    if stage == "pgd":
        monkeypatch.setattr(robustness, "pgd", lambda _, images, *__, **___: cheat(images))
    else:
        monkeypatch.setattr(robustness, "_library_attack", lambda *_: lambda images, _: cheat(images))
    with pytest.raises(RuntimeError, match="outside"):
        outcomes_of(network, images, labels, RobustnessConfig(ThreatModel("Linf", 0.01), autoattack=stage != "pgd"))


def test_square_by_itself_breaks_images(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the gradient attacks little is left to it: here it runs alone."""
    monkeypatch.setattr(robustness, "ENSEMBLE", ("square",))
    images, labels = patterns(64, seed=4)
    for threat_model in (ThreatModel("Linf", 32 / 255), ThreatModel("L2", 2)):
        config = RobustnessConfig(threat_model, attack=PGD, square_queries=200)
        outcomes = outcomes_of(network, images, labels, config)
        assert outcomes["square"].sum() < 0.5 * outcomes["clean"].sum()


# --- the interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_the_literature(successes: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3; and the definition: the ends are 1.96 standard errors of theirs away."""
    interval = wilson_interval(successes, count)
    assert interval == pytest.approx((100 * low, 100 * high), abs=0.0051)
    for end in (value / 100 for value in interval):
        assert abs(successes / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_wilson_intervals_stay_within_the_possible() -> None:
    for count in range(1, 200):
        assert wilson_interval(0, count)[0] == 0
        assert wilson_interval(count, count)[1] == 100


# --- whole evaluations, on files

CONFIG = RobustnessConfig(
    ThreatModel("Linf", 12 / 255),
    attack=AttackConfig(steps=2, relative_step_size=0.5, random_start=True),
    apgd_steps=2,
    square_queries=4,
    limit=28,
    batch_size=8,
    image_size=32,
    val_resize=32,
)


@pytest.fixture(scope="module")
def data(shapes: Path) -> Path:
    return shapes / "shapes_classification" / "train"


@pytest.fixture(scope="module")
def checkpoint_path(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows its 32 images, of four classes, by heart."""
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec).train()
    dataset = open_dataset(data, val_transform(32, resize=32))
    images = torch.stack([dataset[index][0] for index in range(len(dataset))]) / 255
    labels = torch.tensor(dataset.labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    weights = model.backbone.state_dict()
    write_checkpoint(path, spec=spec, state_dict=weights, threat_model=ThreatModel("L2", 0.5))
    return path


@pytest.fixture(scope="module")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    return read_checkpoint(checkpoint_path)


@pytest.fixture(scope="module")
def finished(data: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, evaluate_robustness(CONFIG, checkpoint, data, output, workers=0)


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Without the time that each took."""
    rows = [json.loads(line) for line in (output / "outcomes.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_bgr_network_gets_bgr(
    finished: tuple[Path, RunRecord], data: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The same function of the same images, whose stem expects another order of channels."""
    flipped = {**checkpoint.state_dict, "conv1.weight": checkpoint.state_dict["conv1.weight"].flip(1)}
    spec = checkpoint.spec
    spec = replace(spec, channel_order="BGR", mean=spec.mean[::-1], std=spec.std[::-1])
    config = replace(CONFIG, threat_model=ThreatModel("Linf", 0), autoattack=False)
    evaluate_robustness(config, replace(checkpoint, spec=spec, state_dict=flipped), data, tmp_path / "run", workers=0)
    assert [row["clean"] for row in read_rows(tmp_path / "run")] == [row["clean"] for row in read_rows(finished[0])]


def test_an_evaluation_leaves_outcomes_and_a_record(finished: tuple[Path, RunRecord], checkpoint: Checkpoint) -> None:
    output, record = finished
    assert RunRecord.read(output / "record.json") == record
    assert (record.task, record.threat_model, record.seed) == ("robustness", "L2:0.5", 0)
    assert record.config["threat_model"] == "Linf:12/255"
    assert record.config["images"] == 28
    assert record.config["skipped"] == {}
    assert record.backbone["source_sha256"] == checkpoint.source_sha256
    rows = read_rows(output)
    assert len({row["index"] for row in rows}) == len(rows) == 28
    assert {row["name"].split("/")[0] for row in rows} == {"circle", "cross", "square", "triangle"}
    for stage in STAGES:
        right = sum(row[stage] for row in rows)
        assert record.metrics[f"{stage}_accuracy"] == 100 * right / 28
        ends = (record.metrics[f"{stage}_accuracy_low"], record.metrics[f"{stage}_accuracy_high"])
        assert ends == wilson_interval(right, 28)
    assert record.metrics["autoattack_accuracy"] == record.metrics["square_accuracy"]
    assert 0 < record.metrics["autoattack_accuracy"] < record.metrics["clean_accuracy"]  # else the rest tests nothing


def test_an_evaluation_cut_off_between_batches_ends_the_same(
    finished: tuple[Path, RunRecord],
    data: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the third of four batches: no batch is attacked twice."""
    output, seeds = tmp_path / "whole", []
    original = robustness.attack_batch

    def attack(*arguments: Any, seed: int) -> dict[str, Tensor | None]:
        if len(seeds) == 2 and not (output / "resumed").exists():
            raise KeyboardInterrupt
        seeds.append(seed)
        return original(*arguments, seed=seed)

    monkeypatch.setattr(robustness, "attack_batch", attack)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(CONFIG, checkpoint, data, output, workers=0)
    assert len(read_rows(output)) == 16
    assert not (output / "record.json").exists()
    (output / "resumed").touch()
    record = evaluate_robustness(CONFIG, checkpoint, data, output, workers=0)
    assert len(set(seeds)) == len(seeds) == 4
    assert read_rows(output) == read_rows(finished[0])
    assert outcome(record) == outcome(finished[1])


@pytest.mark.parametrize("torn", ["nothing", "a line", "part of a batch", "a batch without its end", "bytes"])
def test_rows_of_whole_batches_are_kept(finished: tuple[Path, RunRecord], tmp_path: Path, torn: str) -> None:
    """Killed within a write: what lies after the last whole batch is cut off."""
    whole = (finished[0] / "outcomes.jsonl").read_text().splitlines(keepends=True)
    left = {
        "nothing": "",
        "a line": whole[16][:20],
        "part of a batch": "".join(whole[16:19]),
        "a batch without its end": "".join(whole[16:24])[:-1],
        "bytes": "\udcff\n",
    }[torn]
    path, kept = tmp_path / "outcomes.jsonl", "".join(whole[:16])
    path.write_text(kept + left, encoding="utf-8", errors="surrogateescape")
    places = [{name: json.loads(line)[name] for name in ("index", "name", "label")} for line in whole]
    assert robustness._resume(path, places, 8) == [json.loads(line) for line in whole[:16]]
    assert path.read_text() == kept


def test_an_evaluation_cut_off_before_its_record_gets_one(
    finished: tuple[Path, RunRecord],
    data: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = copy_of(finished[0], tmp_path)
    (output / "record.json").unlink()
    with open(output / "outcomes.jsonl", "a") as file:
        file.write("{}\n")  # one row too many
    monkeypatch.setattr(robustness, "attack_batch", lambda *_, **__: pytest.fail("attacked again"))
    record = evaluate_robustness(CONFIG, checkpoint, data, output, workers=0)
    assert outcome(record) == outcome(finished[1])
    assert evaluate_robustness(CONFIG, checkpoint, data, output, workers=0) == record  # and when it has finished


def outcome(record: RunRecord) -> RunRecord:
    """Without what depends on when and from which commit it was written."""
    return replace(record, seconds=0, git_commit=None)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    output = tmp_path / folder.name
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    return output


def test_another_run_is_never_overwritten(
    finished: tuple[Path, RunRecord], data: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    output, _ = finished
    for config, name in (
        (replace(CONFIG, threat_model=ThreatModel("Linf", 2 / 255)), "threat_model"),
        (replace(CONFIG, batch_size=4), "batch_size"),
        (replace(CONFIG, limit=30), "limit"),
    ):
        with pytest.raises(InputError, match=rf"another run \(.*{name} is"):
            evaluate_robustness(config, checkpoint, data, output, workers=0)
    with pytest.raises(InputError, match="checkpoint_sha256"):
        evaluate_robustness(CONFIG, replace(checkpoint, source_sha256="0"), data, output, workers=0)
    with pytest.raises(InputError, match="data_fingerprint"):
        evaluate_robustness(CONFIG, checkpoint, negatives(data, tmp_path / "other"), output, workers=0)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="no run of ours"):
        evaluate_robustness(CONFIG, checkpoint, data, tmp_path, workers=0)


@pytest.mark.parametrize("has_finished", [False, True])
def test_outcomes_of_other_images_are_refused(
    finished: tuple[Path, RunRecord], data: Path, checkpoint: Checkpoint, tmp_path: Path, has_finished: bool
) -> None:
    output = copy_of(finished[0], tmp_path)
    if not has_finished:
        (output / "record.json").unlink()
    path = output / "outcomes.jsonl"
    path.write_text(path.read_text().replace("circle/0000", "circle/9999"))
    with pytest.raises(InputError, match="other images"):
        evaluate_robustness(CONFIG, checkpoint, data, output, workers=0)


def test_a_greater_limit_adds_to_a_smaller_one(
    finished: tuple[Path, RunRecord], data: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    evaluate_robustness(replace(CONFIG, limit=16), checkpoint, data, tmp_path / "few", workers=1)
    few = read_rows(tmp_path / "few")
    assert few == read_rows(finished[0])[:16]
    assert {row["label"] for row in few} == {0, 1, 2, 3}
    evaluate_robustness(replace(CONFIG, limit=None, autoattack=False), checkpoint, data, tmp_path / "all", workers=0)
    assert sorted(row["index"] for row in read_rows(tmp_path / "all")) == list(range(32))


def test_parts_of_a_data_set_are_no_classes(data: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A classifier of two classes was measured on train and val instead."""
    of_two = replace(checkpoint, spec=replace(checkpoint.spec, num_classes=2))
    with pytest.raises(InputError, match="holds train and val, parts of a data set"):
        evaluate_robustness(CONFIG, of_two, data.parent, tmp_path / "run", workers=0)
    assert not (tmp_path / "run").exists()


def test_a_skipped_stage_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: Checkpoint
) -> None:
    """Three classes are too few for APGD-T: a notice, null in the rows, None and a reason in the record."""
    three = tmp_path / "three"
    for name in ("circle", "cross", "square"):
        (three / name).mkdir(parents=True)
        (three / name / "0.jpg").write_bytes((data / name / "00000.jpg").read_bytes())
    spec = replace(checkpoint.spec, num_classes=3)
    small = replace(checkpoint, spec=spec, state_dict=build_backbone(spec).state_dict())
    record = evaluate_robustness(replace(CONFIG, limit=None), small, three, tmp_path / "run", workers=0)
    assert "apgd-t is skipped" in capsys.readouterr().out
    assert list(record.config["skipped"]) == ["apgd-t"]
    assert "needs 4 classes" in record.config["skipped"]["apgd-t"]
    assert record.metrics["apgd-t_accuracy"] is record.metrics["apgd-t_accuracy_low"] is None
    assert record.metrics["autoattack_accuracy"] is not None
    assert {row["apgd-t"] for row in read_rows(tmp_path / "run")} == {None}
    assert None not in {row["square"] for row in read_rows(tmp_path / "run")}


def test_further_outputs_of_a_larger_classifier_need_no_data(data: Path, checkpoint: Checkpoint) -> None:
    """As of the public code's 57 for the 47 classes of DTD: a network is evaluated on what it was trained on."""
    names = open_dataset(data, val_transform(32, resize=32)).classes
    larger = replace(checkpoint, spec=replace(checkpoint.spec, num_classes=6), classes=tuple(names))
    check_classes(names, data, larger)
    for unknown in ([*names, "x"], [*names, "x", "y"]):
        with pytest.raises(InputError, match=r"holds . classes, but .* knows 4:"):
            check_classes(unknown, data, larger)


def test_a_crop_that_shows_little_of_an_image_is_told(
    data: Path, tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, limit=2, autoattack=False, threat_model=ThreatModel())
    for val_resize in (32, 256):
        evaluate_robustness(
            replace(config, val_resize=val_resize), checkpoint, data, tmp_path / str(val_resize), workers=0
        )
        told = capsys.readouterr().out
        assert ("warning: validation sees 32 px cut from images of 256 px: " in told) == (val_resize == 256)


# --- the command line

Run = Callable[..., tuple[int, str, str]]
FAST = ["--image-size", "32", "--val-resize", "32", "--attack.steps", "2", "--apgd-steps", "2", "--square-queries", "2"]
ON_CPU = ["--device", "cpu", "--workers", "0", "--limit", "4"]


def test_the_tool_reports_and_says_where_the_record_lies(
    run_tool: Run, checkpoint_path: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ["--data", data, "--threat-model", "Linf:1/255", "--output", tmp_path / "run", *FAST, *ON_CPU]
    status, out, _ = run_tool("evaluate", "classifier", checkpoint_path, *arguments)
    assert status == 0
    assert "4 images, Linf:1/255" in out
    assert "autoattack" in out
    assert str(tmp_path / "run" / "record.json") in out.splitlines()[-1]
    assert RunRecord.read(tmp_path / "run" / "record.json").config["attack"]["steps"] == 2


def test_an_accuracy_that_is_not_the_expected_one_fails(
    run_tool: Run, checkpoint_path: Path, data: Path, tmp_path: Path
) -> None:
    """And gives no file that says it was, so that a study asks again."""
    arguments = ["--data", data, "--threat-model", "L2:0", "--output", tmp_path / "run", "--no-autoattack"]
    arguments = ["classifier", checkpoint_path, *arguments, *FAST, *ON_CPU]
    assert run_tool("evaluate", *arguments)[0] == 0
    found = RunRecord.read(tmp_path / "run/record.json").metrics["clean_accuracy"]
    assert found is not None
    status, _, err = run_tool("evaluate", *arguments, "--expected", 0 if found > 50 else 100)
    assert (status, err.count("\n")) == (1, 1)
    assert f"{found:.2f} %" in err
    assert not (tmp_path / "run/expected.json").exists()
    assert run_tool("evaluate", *arguments, "--expected", found)[0] == 0
    assert json.loads((tmp_path / "run/expected.json").read_text()) == {"expected": found, "clean_accuracy": found}


def test_without_pyautoattack_it_says_how_to_install_it(
    run_tool: Run, checkpoint_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack.autopgd_base", None)
    arguments = ["--data", data, "--threat-model", "Linf:1/255", "--output", tmp_path / "run", *FAST, *ON_CPU]
    status, _, err = run_tool("evaluate", "classifier", checkpoint_path, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install pyautoattack" in err
    assert not (tmp_path / "run").exists()
    status, out, _ = run_tool("evaluate", "classifier", checkpoint_path, *arguments, "--no-autoattack")
    assert status == 0
    assert "autoattack  skipped" in out
    assert RunRecord.read(tmp_path / "run" / "record.json").metrics["autoattack_accuracy"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threat-model", "L2:-1"], "epsilon"),
        (["--limit", "0"], "limit"),
        (["--attack.steps", "0"], "steps"),
        (["--apgd-steps", "0"], "apgd_steps"),
        (["--square-queries", "-1"], "square_queries"),
        (["--precision", "fp16"], "fp32, bf16"),
        (["--val-resize", "16"], "val_resize"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_refused(
    run_tool: Run, checkpoint_path: Path, data: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    good = ["--data", data, "--threat-model", "Linf:1/255", "--output", tmp_path / "run", *FAST, *ON_CPU]
    status, _, err = run_tool("evaluate", "classifier", checkpoint_path, *good, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "digits", "refused"), [(1000, 1, True), (1000, 4, False), (11, 1, False)])
def test_numbered_folders_do_not_sort_as_the_outputs_of_imagenet_networks(
    checkpoint: Checkpoint, count: int, digits: int, refused: bool
) -> None:
    """ImageNet-V2 has folders 0 to 999, of which 10 comes before 2: nearly every label would be another class."""
    names = sorted(f"{number:0{digits}}" for number in range(count))
    unnamed = replace(checkpoint, spec=replace(checkpoint.spec, num_classes=count), classes=())
    with pytest.raises(InputError, match=r"sorts 10 before 2.*0002") if refused else nullcontext():
        check_classes(names, Path("folder"), unnamed)
    check_classes(names, Path("folder"), replace(unnamed, classes=tuple(names)))


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (lambda own: own, False),
        (lambda own: [], False),
        (lambda own: [*"0123"], False),  # of shards that name none
        (lambda own: own[::-1], True),
        (lambda own: [own[0], *"abc"], True),
    ],
)
def test_as_many_classes_by_other_names_are_refused(
    data: Path, tmp_path: Path, names: Callable[[list[str]], list[str]], refused: bool
) -> None:
    own = open_dataset(data, val_transform(32, resize=32)).classes
    spec, path = BackboneSpec("resnet18", len(own)), tmp_path / "checkpoint.pt"
    weights = build_backbone(spec).state_dict()
    write_checkpoint(path, spec=spec, state_dict=weights, threat_model=None, classes=names(own))
    config = RobustnessConfig(ThreatModel("L2", 0), autoattack=False, limit=1, val_resize=32, image_size=32)
    if refused:
        with pytest.raises(
            InputError, match=rf"the class \w+ where checkpoint\.pt knows \w+ \([34] of {len(own)} differ"
        ):
            evaluate_robustness(config, read_checkpoint(path), data, tmp_path / "out", workers=0)
    else:
        assert (
            evaluate_robustness(config, read_checkpoint(path), data, tmp_path / "out", workers=0).config["images"] == 1
        )


def test_a_checkpoint_that_does_not_fit_is_refused(
    run_tool: Run, data: Path, tmp_path: Path, torchvision_file: Callable[[str], Path]
) -> None:
    good = ["--data", data, "--threat-model", "Linf:1/255", "--output", tmp_path / "run", *FAST, *ON_CPU]
    status, _, err = run_tool("evaluate", "classifier", torchvision_file("mobilenet_v2"), *good)
    assert status == 2
    assert "holds 4 classes, but mobilenet_v2.pth knows 10: give data with the classes that" in err
    _, _, err = run_tool("evaluate", "classifier", torchvision_file("mobilenet_v2"), "--data", data.parent, *good[2:])
    assert "train and val, parts of a data set" in err
    status, _, err = run_tool("evaluate", "classifier", tmp_path / "none.pt", *good)
    assert status == 2
    assert "no file at" in err
    assert not (tmp_path / "run").exists()
