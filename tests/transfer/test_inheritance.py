"""Robustness inheritance: each method against its paper's equation, mRI against a few independent lines."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from robust_backbones.analysis.inheritance import (
    correlate,
    correlation_table,
    correlations,
    distance_figure,
    permutation_p,
)
from robust_backbones.checkpoint.convert import BackboneMetadata, convert
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Learner
from robust_backbones.data.batches import train_batches, val_batches
from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, image_seed
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.runs.files import write_json
from robust_backbones.runs.locks import lock
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.inheritance import corruptions
from robust_backbones.transfer.inheritance.adapters import LowRankModel, PromptedModel
from robust_backbones.transfer.inheritance.config import DISTANCE_NAMES, PRETRAINING, InheritanceConfig
from robust_backbones.transfer.inheritance.corruptions import CorruptionConfig, mean_corruption_error
from robust_backbones.transfer.inheritance.detectors import with_own_classifier
from robust_backbones.transfer.inheritance.distances import gaussian, otdd, sinkhorn, wasserstein
from robust_backbones.transfer.inheritance.job import Job, accuracy_on, for_evaluation, rate, train
from robust_backbones.transfer.inheritance.make_sets import apply, make_set
from robust_backbones.transfer.inheritance.matrix import read_matrices
from robust_backbones.transfer.inheritance.methods import (
    METHODS,
    diagonal_fisher,
    distance_to_start,
    distillation,
    find,
    greedy_soup,
    interpolate,
    mean,
    ordered,
)
from robust_backbones.transfer.inheritance.run import run_protocol
from robust_backbones.transfer.inheritance.sets import Memory, RelatedSet, open_related_set
from tests.conftest import disk_of, negatives, randomize_batch_norms

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
Run = Callable[..., tuple[int, str, str]]
SPEC = BackboneSpec("resnet18", 4)
NAMES = ("circle", "cross", "square", "triangle")
CPU = Compute(torch.device("cpu"))
SMALL = InheritanceConfig(
    epochs=2,
    batch_size=8,
    lr=0.01,
    warmup_steps=2,
    image_size=32,
    val_resize=32,
    distance_images=12,
    sinkhorn_regularization=0.5,
    fisher_images=2,
)
OPTIONS = ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "--val-resize", "32"]
OPTIONS += ["--distance-images", "12", "--sinkhorn-regularization", "0.5", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def start(narrow_resnet18: None, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A network for the four shapes, with batch norms that look trained."""
    backbone = build_backbone(SPEC, seed=3)
    randomize_batch_norms(backbone)
    path = tmp_path_factory.mktemp("start") / "start.pt"
    write_checkpoint(path, spec=SPEC, state_dict=backbone.state_dict(), threat_model=ThreatModel("L2", 0.5))
    return read_checkpoint(path)


@pytest.fixture(scope="module")
def world(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pretraining/`` with train and val, and two related sets: ``negative``, and ``mirrored`` with two classes."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(shapes / "shapes_classification", root / "pretraining")
    for source in sorted((root / "pretraining/train").rglob("*.*")):
        image, name = cv2.imread(str(source)), source.parent.name
        _write(root / "negative" / name / source.with_suffix(".png").name, 255 - image)
        if name in ("cross", "triangle"):
            _write(root / "mirrored" / name / source.with_suffix(".png").name, image[:, ::-1])
    return root


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def related(world: Path, name: str) -> RelatedSet:
    return open_related_set(world / name, NAMES, val_transform(32, resize=32))


def job_on(world: Path, start: Checkpoint, *, name: str = "mirrored", **change: Any) -> Job:
    nothing = {key: torch.zeros_like(value) for key, value in build_backbone(SPEC).named_parameters()}
    return Job(
        config=replace(SMALL, **change),
        start=start,
        target=related(world, name),
        seed=5,
        compute=CPU,
        workers=0,
        fisher=lambda: nothing,
        weights=lambda name: start.state_dict,
    )


@pytest.fixture(scope="module")
def fine_tuned(world: Path, start: Checkpoint) -> dict[str, Tensor]:
    return METHODS["fine_tuning"].run(job_on(world, start)).backbone.state_dict()


def pixels_of(images: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*images, strict=True)
    return torch.stack(pixels).float() / 255, torch.tensor(labels)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def model_of(start: Checkpoint) -> NormalizedModel:
    return NormalizedModel(start.build(), start.spec).eval()


# --- related sets and their masks ------------------------------------------------------------------------------------


def test_the_mask_is_the_classes_that_the_folders_name(world: Path, start: Checkpoint) -> None:
    one = related(world, "mirrored")
    assert one.classes == (1, 3)
    assert {
        (label, Path(name).parent.name) for label, name in zip(one.images.labels, one.images.names, strict=True)
    } == {
        (0, "cross"),
        (1, "triangle"),
    }
    model = model_of(start)
    images, labels = pixels_of(one.images)
    with torch.no_grad():
        logits = model(images)
    logits[:, [0, 2]] = -math.inf  # the mask by its definition
    right = [int(row.argmax()) == one.classes[label] for row, label in zip(logits, labels, strict=True)]
    assert accuracy_on(one, model, CPU, workers=0) == 100 * sum(right) / len(right)
    assert len({int(row.argmax()) for row in logits}) > 1 or sum(right) not in (0, len(right))


def test_folded_and_decoded_images_have_the_same_accuracy(world: Path, start: Checkpoint) -> None:
    one, memory = related(world, "negative"), Memory(1, 0)
    kept = replace(one, images=memory.keep(one.images, "negative"))
    assert memory.used == 32 * 3 * 32 * 32
    model = model_of(start)
    folded = for_evaluation(model, CPU)
    assert accuracy_on(kept, folded, CPU, workers=0) == accuracy_on(one, model, CPU, workers=0)
    assert [val_batches(each.images, 8, workers=2).num_workers for each in (kept, one)] == [0, 2]
    assert memory.keep(kept.images, "negative") is kept.images
    assert Memory(1e-6, 0).keep(one.images, "negative") is one.images  # there is no room
    shuffled = kept.images.take([7, 2]).take([1, 0])
    assert torch.equal(shuffled[0][0], one.images[2][0])
    assert shuffled.labels == [one.images.labels[2], one.images.labels[7]]
    first, second = (
        list(train_batches(images, batch_size=8, micro_batch_size=8, epoch=1, workers=0))
        for images in (one.images, kept.images)
    )
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_sets_of_numbered_folders_and_of_parts(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    for number in (3, 0, 10):
        _write(tmp_path / "v2" / str(number) / "a.png", image)
    names = [f"n{number:02d}" for number in range(12)]
    one = open_related_set(tmp_path / "v2", names, val_transform(4, resize=4))
    assert one.classes == (0, 3, 10)
    assert one.images.labels == [0, 1, 2]
    for part in itertools.product(("fog", "snow"), ("1", "5"), ("n07", "n02")):
        _write(tmp_path / "c" / Path(*part) / "a.png", image)
    one = open_related_set(tmp_path / "c", names, val_transform(4, resize=4), name="imagenet-c")
    assert (one.name, one.classes, len(one.images)) == ("imagenet-c", (2, 7), 8)
    assert all(
        one.images.classes[label] in name for label, name in zip(one.images.labels, one.images.names, strict=True)
    )


def test_a_set_has_the_images_that_a_folder_of_classes_has(tmp_path: Path) -> None:
    """Of any format that Pillow reads, also in a folder that is a link."""
    image = np.zeros((4, 4, 3), np.uint8)
    for name in ("one/cat/a.png", "one/dog/a.png", "elsewhere/b.png"):
        _write(tmp_path / name, image)
    (tmp_path / "one/cat/linked").symlink_to(tmp_path / "elsewhere")
    for name in ("cat/c.jfif", "dog/d.gif"):
        shutil.copy(tmp_path / "one/cat/a.png", tmp_path / "one" / name)
    found = open_related_set(tmp_path / "one", ["cat", "dog"], val_transform(4, resize=4)).images
    assert found.names == open_dataset(tmp_path / "one", val_transform(4, resize=4)).names
    assert len(found) == 5
    assert found[1][0].shape == (3, 4, 4)


def test_sets_that_are_none_are_refused(tmp_path: Path) -> None:
    def refused(name: str, *words: str) -> None:
        with pytest.raises(InputError) as error:
            open_related_set(tmp_path / name, ["cat", "dog"], val_transform(4, resize=4))
        assert all(word in str(error.value) for word in words), error.value

    image = np.zeros((4, 4, 3), np.uint8)
    refused("imagenet-r", "no related data set", "ImageNet-R (Hendrycks")
    _write(tmp_path / "one/cat/a.png", image)
    _write(tmp_path / "one/cow/a.png", image)
    refused("one", "no classes of the pre-training set (cow)")
    (tmp_path / "two/cat").mkdir(parents=True)
    refused("two", "cat holds no image", "widen the mask")
    (tmp_path / "three").mkdir()
    refused("three", "no class folders")


# --- the engine ------------------------------------------------------------------------------------------------------


def test_fine_tuning_is_sgd_on_masked_logits(world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor]) -> None:
    """The protocol written out: warm-up, cosine, momentum, batch norms in train mode, other classes at -inf."""
    job = job_on(world, start)
    model = NormalizedModel(start.build(), start.spec).train()
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    images = job.target.images.seen_through(job.target.images.transform, seed=job.seed)
    step = 0
    for epoch in range(2):
        for pixels, labels in train_batches(images, batch_size=8, micro_batch_size=8, epoch=epoch, workers=0):
            logits = model(pixels.float() / 255)
            masked = torch.full_like(logits, -math.inf)
            masked[:, [1, 3]] = logits[:, [1, 3]]
            target = torch.tensor([job.target.classes[label] for label in labels])
            gradients = torch.autograd.grad(F.cross_entropy(masked, target), list(model.parameters()))
            # 4 steps, of which a fifth is less than one: no warm-up
            rate = 0.01 * (1 + math.cos(math.pi * step / 4)) / 2
            with torch.no_grad():
                for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(gradient)
                    parameter -= rate * v
            step += 1
    assert step == job.steps == 4
    found = model.backbone.state_dict()
    floats = [name for name, tensor in found.items() if tensor.is_floating_point()]
    moved, apart = (
        torch.cat([(one[name] - other[name]).flatten() for name in floats]).norm()
        for one, other in ((fine_tuned, start.state_dict), (fine_tuned, found))
    )
    assert moved > 0.1
    assert apart < 0.02 * moved  # what rounding becomes in batch norms over 8 values


def test_the_rate_warms_up_and_goes_to_zero() -> None:
    config = replace(SMALL, warmup_steps=196)
    found = [rate(config, 1170, step) for step in range(1170)]
    assert found[:196] == pytest.approx([(step + 1) / 196 for step in range(196)])
    assert found[196:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 974) for i in range(974)])
    assert rate(config, 100, 19) == 1  # a short run warms up for a fifth
    assert rate(config, 100, 9) == 0.5


# --- methods that fine-tune ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lwf", {"lwf_weight": 0.0}),
        ("ewc", {"ewc_strength": 1e4}),  # the Fisher information of ``job_on`` is zero
        ("l2_init", {"l2_init_strength": 0.0}),
        ("l2_sp", {"l2_sp_strength": 0.0}),
        ("lp_ft", {}),  # the linear probe of ``job_on`` is the network itself
    ],
)
def test_without_its_term_a_method_is_fine_tuning_bit_for_bit(
    world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor], name: str, change: dict[str, Any]
) -> None:
    assert_same(METHODS[name].run(job_on(world, start, **change)).backbone.state_dict(), fine_tuned)


def test_distillation_is_the_divergence_of_softened_predictions(world: Path, start: Checkpoint) -> None:
    job = job_on(world, start, lwf_weight=3.0, lwf_temperature=2.5)
    images, _ = pixels_of([job.target.images[position] for position in range(6)])
    now = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model_of(start)(images)[:, [1, 3]]
    expected = 0.0
    for row_before, row_now in zip(before.double(), now.double(), strict=True):
        q, p = (torch.exp(row / 2.5) / torch.exp(row / 2.5).sum() for row in (row_before, row_now))
        expected += float(sum(q[i] * math.log(q[i] / p[i]) for i in range(2)))
    assert float(distillation(job)(images, now)) == pytest.approx(3 * expected / 6, rel=1e-3)


def test_distance_to_the_start_has_ewcs_gradient(start: Checkpoint, images: Tensor) -> None:
    """Kirkpatrick et al. 2017, eq. 3: the gradient of lambda / 2 Σ F (θ - θ⁰)² is lambda F (θ - θ⁰)."""
    model = model_of(start)
    generator = torch.Generator().manual_seed(1)
    fisher = {n: torch.rand(p.shape, generator=generator) for n, p in model.backbone.named_parameters()}
    penalty = distance_to_start(model, 7.0 / 2, fisher)
    plain = distance_to_start(model, 1.0)
    assert penalty(images, images) == 0
    shifts = {}
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            shifts[name] = 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter += shifts[name]
    penalty(images, images).backward()
    for name, parameter in model.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, 7.0 * fisher[name] * shifts[name], rtol=1e-2, atol=1e-6)
    whole = sum(float(shift.double().square().sum()) for shift in shifts.values())
    assert float(plain(images, images).detach()) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["lwf", "l2_init"])
def test_a_strong_term_keeps_the_network(
    world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor], name: str
) -> None:
    """In weights for l2_init, in predictions for LwF."""
    kept = METHODS[name].run(job_on(world, start, lwf_weight=20.0, l2_init_strength=20.0))
    before = model_of(start)
    after = model_of(replace(start, state_dict=fine_tuned))
    images, _ = pixels_of(related(world, "mirrored").images)

    def away(model: NormalizedModel) -> float:
        if name == "lwf":
            with torch.no_grad():
                # Distillation holds the predictions in training, with each batch's own statistics.
                p, q = (net(images)[:, [1, 3]].softmax(1) for net in (model.train(), before))
            return float((p - q).abs().mean())
        pairs = zip(model.backbone.parameters(), before.backbone.parameters(), strict=True)
        return sum(float((one - other).detach().square().sum()) for one, other in pairs)

    assert away(kept) < 0.8 * away(after)


@pytest.mark.parametrize("change", [{}, {"keep_last": True, "batch_size": 7}])
def test_linear_probe_is_sgd_on_the_classifier_of_a_frozen_network(
    world: Path, start: Checkpoint, change: dict[str, Any]
) -> None:
    job = job_on(world, start, lr=0.1, **change)
    found = METHODS["linear_probe"].run(job).backbone.state_dict()
    others = {name: tensor for name, tensor in found.items() if not name.startswith("fc.")}
    assert_same(others, {name: start.state_dict[name] for name in others})
    assert torch.equal(found["fc.weight"][[0, 2]], start.state_dict["fc.weight"][[0, 2]])

    class Probe(NormalizedModel):
        """The same through the engine: everything but the classifier frozen, in eval mode."""

        def train(self, mode: bool = True) -> "Probe":
            return super().train(False)

    model = Probe(start.build(), start.spec).requires_grad_(False)
    model.backbone.get_submodule("fc").requires_grad_(True)
    slow = train(job, model).backbone.state_dict()
    torch.testing.assert_close(found["fc.weight"], slow["fc.weight"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["fc.bias"], slow["fc.bias"], rtol=1e-3, atol=1e-5)
    assert (found["fc.weight"] - start.state_dict["fc.weight"]).abs().max() > 1e-2


def test_lp_ft_starts_from_the_probe(world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor]) -> None:
    probe = {**start.state_dict, "fc.bias": start.state_dict["fc.bias"] + torch.tensor([0.0, 1.0, 0.0, -1.0])}
    asked: list[str] = []

    def weights(name: str) -> Mapping[str, Tensor]:
        asked.append(name)
        return probe

    job = replace(job_on(world, start), weights=weights)
    found = METHODS["lp_ft"].run(job).backbone.state_dict()
    assert asked == ["linear_probe"]
    expected = train(job, job.model(probe)).backbone.state_dict()
    assert_same(found, expected)
    assert not torch.equal(found["fc.bias"], fine_tuned["fc.bias"])


# --- Fisher information ----------------------------------------------------------------------------------------------


def test_fisher_information_by_its_definition(images: Tensor) -> None:
    """Over every image and every label, one gradient at a time, weighted by the network's own probability."""
    spec = BackboneSpec("resnet18", 3)
    model = NormalizedModel(build_backbone(spec, seed=2), spec)
    randomize_batch_norms(model)
    model.train()
    pixels = (images[:2] * 255).byte()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = diagonal_fisher(model, [(pixels, torch.tensor([0, 1]))], CPU)
    assert model.training
    assert_same(dict(model.named_buffers()), statistics)
    model.eval()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.backbone.named_parameters()}
    for image in pixels.float() / 255:
        for y in range(3):
            log_p = model(image[None]).log_softmax(1)[0, y]
            gradients = torch.autograd.grad(log_p, list(model.backbone.parameters()))
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += float(log_p.detach().exp()) * gradient.square() / 2
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * scale)

    generator = torch.Generator().manual_seed(0)
    drawn = diagonal_fisher(model, [(pixels, torch.tensor([0, 1]))], CPU, labels=48, generator=generator)
    # An estimate of the same: 96 draws, of the sums over all parameters.
    assert sum(float(t.sum()) for t in drawn.values()) == pytest.approx(
        sum(float(t.sum()) for t in expected.values()), rel=0.3
    )
    assert not torch.equal(drawn["fc.bias"], found["fc.bias"])


# --- weights of several networks -------------------------------------------------------------------------------------


def test_wise_ft_ends_in_its_end_points_bit_for_bit(
    world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor]
) -> None:
    job = replace(job_on(world, start), weights={"fine_tuning": fine_tuned}.__getitem__)
    counters = {name for name in fine_tuned if name.endswith("num_batches_tracked")}

    def floats(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.items() if name not in counters}

    at = {name: find(name, SMALL).run(job).backbone.state_dict() for name in ("wise_ft_0", "wise_ft_1", "wise_ft_0.3")}
    assert_same(floats(at["wise_ft_0"]), floats(start.state_dict))
    assert_same(at["wise_ft_1"], fine_tuned)
    for name, tensor in floats(at["wise_ft_0.3"]).items():
        torch.testing.assert_close(tensor, 0.7 * start.state_dict[name] + 0.3 * fine_tuned[name])
    assert_same(METHODS["wise_ft"].run(job).backbone.state_dict(), interpolate(start.state_dict, fine_tuned, 0.5))


def test_a_uniform_soup_is_the_mean(world: Path, start: Checkpoint, fine_tuned: dict[str, Tensor]) -> None:
    other = {name: tensor + 1 for name, tensor in fine_tuned.items()}
    job = replace(
        job_on(world, start, soup=("pretrained", "lwf", "fine_tuning")),
        weights={"fine_tuning": fine_tuned, "lwf": other}.__getitem__,
    )
    soup = find("uniform_soup", job.config).run(job).backbone.state_dict()
    for name, tensor in soup.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (start.state_dict[name] + fine_tuned[name] + other[name]) / 3)
    assert_same(mean([fine_tuned]), fine_tuned)
    assert find("uniform_soup", job.config).needs == ("lwf", "fine_tuning")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_with_a_file_of_another_precision_is_float32s(dtype: torch.dtype) -> None:
    start, end = {"w": torch.linspace(0, 1, 7, dtype=dtype)}, {"w": torch.rand(7)}
    wanted = (start["w"].float() + end["w"]) / 2
    for found in (mean([start, end]), interpolate(start, end, 0.5)):
        torch.testing.assert_close(found["w"], wanted)


vectors = st.lists(st.floats(-4, 4, width=16), min_size=3, max_size=3)


@given(members=st.lists(vectors, min_size=1, max_size=5), goal=vectors)
@settings(deadline=None, max_examples=30)
def test_a_greedy_soup_is_never_below_its_best_member(members: list[list[float]], goal: list[float]) -> None:
    named = {str(place): {"w": torch.tensor(member)} for place, member in enumerate(members)}

    def score(weights: Mapping[str, Tensor]) -> float:
        return -float((weights["w"] - torch.tensor(goal)).norm())

    chosen, soup = greedy_soup(named, score)
    assert score(soup) >= max(score(member) for member in named.values())
    torch.testing.assert_close(soup["w"], torch.stack([named[name]["w"] for name in chosen]).mean(0))
    assert score(named[chosen[0]]) == max(score(member) for member in named.values())


def test_the_greedy_soup_of_a_set_is_chosen_by_images_it_was_not_trained_on(
    world: Path, start: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_on(world, start, name="negative", soup=("pretrained", "fine_tuning"), held_out=0.25, epochs=1, lr=0.05)
    seen: list[int] = []
    monkeypatch.setattr(ClassificationDataset, "in_memory", property(lambda self: seen.append(len(self))))
    soup = METHODS["greedy_soup"].run(job)
    assert set(seen) == {24, 8}
    said = capsys.readouterr().out.strip().removeprefix("greedy soup on negative: ").split(", ")
    if "pretrained" in said and len(said) == 1:
        assert_same(soup.backbone.state_dict(), start.state_dict)
    assert set(said) <= {"pretrained", "fine_tuning"}


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_lora_is_the_network_at_first_and_the_same_when_merged(arch: str, images: Tensor) -> None:
    spec = BackboneSpec(arch, 4)
    backbone = build_backbone(spec)
    randomize_batch_norms(backbone)
    plain = NormalizedModel(build_backbone(spec), spec).eval()
    plain.backbone.load_state_dict(backbone.state_dict())
    model = LowRankModel(backbone, spec, rank=2, alpha=4.0, seed=0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(name.endswith(("down.weight", "up.weight")) for name in names)
    with torch.no_grad():
        assert torch.equal(model.train()(images), plain(images))  # batch norms stay in eval mode
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        apart = model(images)
        model.merge()
        torch.testing.assert_close(model(images), apart, rtol=1e-3, atol=1e-3)
        assert (apart - plain(images)).abs().max() > 0.01
    merged = model.backbone.state_dict()
    assert merged.keys() == plain.backbone.state_dict().keys()
    changed = [n for n, tensor in plain.backbone.state_dict().items() if not torch.equal(tensor, merged[n])]
    assert len(changed) == len(names) / 2
    for name in changed:
        update = (merged[name] - plain.backbone.state_dict()[name]).flatten(1).double()
        values = torch.linalg.svdvals(update)
        assert values[min(2, len(values) - 1) :].max() <= 1e-4 * values[0] or len(values) <= 2


def test_lora_learns_and_leaves_a_plain_network(world: Path, start: Checkpoint) -> None:
    found = METHODS["lora"].run(job_on(world, start, lora_rank=2)).backbone.state_dict()
    assert found.keys() == start.state_dict.keys()
    changed = {name for name in found if not torch.equal(found[name], start.state_dict[name])}
    convolutions = {name for name, tensor in start.state_dict.items() if tensor.dim() == 4}
    assert changed == convolutions


def test_a_prompt_is_a_frame_around_the_image(world: Path, start: Checkpoint) -> None:
    job = job_on(world, start, prompt_width=3)
    images, _ = pixels_of(job.target.images)
    before = PromptedModel(start.build(), start.spec, width=3, image_size=32).eval()
    assert torch.equal(before(images), model_of(start)(images))
    model = METHODS["visual_prompt"].run(job)
    assert isinstance(model, PromptedModel)
    assert_same(model.backbone.state_dict(), start.state_dict)
    difference = (model.normalize(images) - before.normalize(images)).detach()
    assert difference[:, :, 3:-3, 3:-3].abs().max() == 0
    assert difference[:, :, :3].abs().max() > 0
    torch.testing.assert_close(difference[0], difference[1], rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = model(images)[:, [1, 3]]
    right = (logits.argmax(1) == torch.tensor(job.target.images.labels)).double().mean()
    assert accuracy_on(job.target, for_evaluation(model, CPU), CPU, workers=0) == pytest.approx(100 * float(right))


def test_methods_come_after_what_they_need_and_unknown_ones_are_refused() -> None:
    assert ordered(["wise_ft", "lp_ft", "wise_ft_0.3"], SMALL) == [
        *("fine_tuning", "wise_ft", "linear_probe", "lp_ft", "wise_ft_0.3")
    ]
    assert ordered(["uniform_soup"], replace(SMALL, soup=("wise_ft", "pretrained"))) == [
        *("fine_tuning", "wise_ft", "uniform_soup")
    ]
    for name, soup, word in (
        ("dropout", (), "dropout"),
        ("wise_ft_2", (), "alpha"),
        ("greedy_soup", ("visual_prompt",), "visual_prompt"),
        ("uniform_soup", ("greedy_soup",), "greedy_soup"),
    ):
        with pytest.raises(InputError, match=word):
            find(name, replace(SMALL, soup=soup or SMALL.soup))


# --- distances -------------------------------------------------------------------------------------------------------


def test_optimal_transport_of_equal_samples_is_an_assignment() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)) + np.eye(5)[0]
    costs = np.array([[sum((a - b) ** 2) for b in y] for a in x])
    rows, columns = linear_sum_assignment(costs)
    exact = wasserstein(x, y)
    assert exact == pytest.approx(math.sqrt(costs[rows, columns].mean()), rel=1e-9)
    assert wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-6)
    entropic = [sinkhorn(x, y, regularization=r) for r in (0.5, 0.1, 0.02)]
    assert entropic == sorted(entropic, reverse=True)  # to W_2 from above
    assert all(value >= exact * (1 - 1e-6) for value in entropic)
    assert entropic[0] > 1.05 * exact
    assert entropic[-1] == pytest.approx(exact, rel=1e-2)


def test_a_distance_is_the_least_cost_of_samples_of_unequal_size() -> None:
    """Two points against one: each half of the mass goes its own way."""
    x, y = np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 4.0]])
    assert wasserstein(x, y) == pytest.approx(math.sqrt((16 + 25) / 2))


@pytest.mark.parametrize("inner", [wasserstein, gaussian])
def test_otdd_is_that_of_an_independent_program(inner: Callable[..., float]) -> None:
    """scipy's linear programs (HiGHS) within and without; for normal distributions eigenvalues of S_x S_y (POT's own
    function fails where classes have fewer points than dimensions)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(8, 3)) * 2 + 1
    a, b = np.array([0] * 5 + [1] * 3 + [7] * 2), np.array([3] * 4 + [1] * 4)

    def transport(costs: np.ndarray) -> float:
        n, m = costs.shape
        rows = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)] + [np.tile(np.eye(m)[j], n) for j in range(m)]
        return float(linprog(costs.ravel(), A_eq=np.array(rows), b_eq=[1 / n] * n + [1 / m] * m).fun)

    def squared(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.array([[sum((s - t) ** 2) for t in q] for s in p])

    def between(p: np.ndarray, q: np.ndarray) -> float:
        if inner is wasserstein:
            return transport(squared(p, q))
        one, other = (np.cov(points.T, bias=True) for points in (p, q))
        roots = np.sqrt(np.maximum(np.linalg.eigvals(one @ other).real, 0))
        return float(((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(one + other) - 2 * roots.sum())

    costs = squared(x, y) + np.array([[between(x[a == i], y[b == j]) for j in b] for i in a])
    found = otdd(x, a, y, b, inner=inner)
    assert found == pytest.approx(math.sqrt(transport(costs)), rel=1e-6)
    assert otdd(y, b, x, a, inner=inner) == pytest.approx(found, rel=1e-9)
    assert found > wasserstein(x, y)
    # A set and itself, in another order and with other names of the same classes.
    order = rng.permutation(10)
    assert otdd(x, a, x[order], np.array([2, 0, 0, 0, 0, 0, 0, 1])[a][order], inner=inner) == pytest.approx(0, abs=1e-5)
    # With one class in each, images and classes cost the same.
    one = np.zeros(10, int), np.zeros(8, int)
    alone = otdd(x, one[0], y, one[1], inner=inner)
    assert alone == pytest.approx(math.hypot(wasserstein(x, y), inner(x, y)), rel=1e-9)
    # Labels that cut across the points of the same two clouds.
    assert otdd(x, a, x, rng.permutation(a), inner=inner) > 0.1


def test_between_normal_distributions_it_is_the_closed_form() -> None:
    """Of samples on the axes, whose means and variances are known: W_2² = Σ (m - m')² + (s - s')²."""
    axes = np.concatenate([np.eye(3), -np.eye(3)]) * math.sqrt(3)  # mean 0, covariance 1
    x, y = axes * [1.0, 2.0, 0.5], axes * [3.0, 1.0, 0.0] + [1.0, 0.0, -2.0]
    expected = math.sqrt(1 + 4 + (3 - 1) ** 2 + (2 - 1) ** 2 + 0.5**2)
    assert gaussian(x, y) == pytest.approx(expected, rel=1e-9)
    assert gaussian(x, x) == pytest.approx(0, abs=1e-7)


# --- the protocol ----------------------------------------------------------------------------------------------------


def protocol(world: Path, start: Checkpoint, output: Path, methods: list[str], **change: Any) -> list[RunRecord]:
    return run_protocol(
        {"start": start},
        world / "pretraining",
        {name: world / name for name in ("negative", "mirrored")},
        output,
        replace(SMALL, epochs=1, **change),
        methods=methods,
        workers=0,
    )


@pytest.fixture(scope="module")
def done(world: Path, start: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done")
    protocol(world, start, output, ["wise_ft_0", "wise_ft_1"])
    return output


def test_mri_from_the_raw_records(done: Path) -> None:
    """By a few lines that know the files and the formula alone; equal to the last digit."""

    def accuracies(path: Path) -> dict[str, float]:
        metrics = json.loads(path.read_text())["metrics"]
        return {key.split("/")[1]: value for key, value in metrics.items()}

    before = accuracies(done / "start/pretrained/record.json")
    sets = sorted(before.keys() - {"pretraining"})
    for one in read_matrices([done]):
        improvements = []
        for i in sets:
            after = accuracies(done / "start" / one.method / i / "seed_0/record.json")
            improvements.append(math.fsum(after[j] - before[j] for j in sets if j != i) / (len(sets) - 1))
        assert one.mean_robustness_improvement == math.fsum(improvements) / len(improvements)
        assert [one.robustness_improvement(i) for i in sets] == improvements
    assert {one.method for one in read_matrices([done])} == {"fine_tuning", "wise_ft_0", "wise_ft_1"}
    with pytest.raises(InputError, match=r"seed 0 is in 2 of these folders"):
        read_matrices([done, done])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"epochs": 7}}, r"both called start, and differ in epochs: make a table of each"),
        ({"backbone": {"source_sha256": "another"}}, "differ in weights"),
        ({"config": {"method": None}}, "says no method and target"),
        ({"metrics": {"accuracy/negative": None}}, r"in .*start/pretrained/record.json and .* on different sets"),
        ({"seed": "x"}, r"not a run record \(seed\)"),
    ],
)
def test_a_table_is_of_one_setting_and_of_whole_records(
    done: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    for path in sorted(done.glob("start/*/**/record.json")):
        values = json.loads(path.read_text())
        values["seed"] += 1 if "seed_" in str(path) else 0  # beside `done`: no cell is there twice
        for name, value in change.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
        write_json(tmp_path / path.relative_to(done), values)
    with pytest.raises(InputError, match=words):
        read_matrices([done, tmp_path])


def test_methods_with_settings_of_their_own_stand_in_one_table(done: Path, tmp_path: Path) -> None:
    """Their networks are measured alike before."""

    def copy(changes: dict[str, Any]) -> None:
        for name in ("pretrained/record.json", "distances/record.json"):
            values = json.loads((done / "start" / name).read_text())
            write_json(tmp_path / "start" / name, {**values, "config": {**values["config"], **changes}})
        for path in (done / "start/fine_tuning").rglob("record.json"):
            values = json.loads(path.read_text())
            values["config"] |= {**changes, "method": "tuned"}
            write_json(tmp_path / "start/tuned" / path.relative_to(done / "start/fine_tuning"), values)

    copy({"lr": 0.5})
    found = {one.method: one.mean_robustness_improvement for one in read_matrices([done, tmp_path])}
    assert found["tuned"] == found["fine_tuning"]
    copy({"limit": 7})
    with pytest.raises(InputError, match="differ in limit"):
        read_matrices([done, tmp_path])


def test_the_protocol_measures_what_its_networks_do(world: Path, start: Checkpoint, done: Path) -> None:
    """Endpoints of WiSE-FT are the networks that others are; every accuracy is that of the network that was written."""
    one = {matrix.method: matrix for matrix in read_matrices([done])}
    for name in ("negative", "mirrored"):
        assert one["wise_ft_0"].after[name] == one["wise_ft_0"].before
        assert one["wise_ft_1"].after[name] == one["fine_tuning"].after[name]
        model = model_of(read_checkpoint(done / "start/fine_tuning" / name / "seed_0/checkpoint.pt"))
        for evaluated in ("negative", "mirrored"):
            accuracy = accuracy_on(related(world, evaluated), for_evaluation(model, CPU), CPU, workers=0)
            assert one["fine_tuning"].after[name][evaluated] == accuracy
    assert one["wise_ft_0"].mean_robustness_improvement == 0
    record = RunRecord.read(done / "start/distances/record.json")
    assert record.config["images"] == 12
    assert record.metrics.keys() == {
        f"{kind}/{name}" for kind in ("wasserstein", "sinkhorn") for name in ("negative", "mirrored", "pretraining")
    }
    assert one["fine_tuning"].distances["negative"] == record.metrics["wasserstein/negative"]


@pytest.mark.parametrize("name", ["otdd", "otdd_gaussian"])
def test_a_distance_is_recorded_by_its_name(
    name: str, world: Path, start: Checkpoint, done: Path, tmp_path: Path
) -> None:
    """In the record, the table and the figure; labels make it no smaller than without them."""
    protocol(world, start, tmp_path, ["wise_ft_0"], distance=name)
    record = RunRecord.read(tmp_path / "start/distances/record.json")
    without = RunRecord.read(done / "start/distances/record.json").metrics
    assert record.metrics.keys() == {f"{name}/{one}" for one in ("negative", "mirrored", "pretraining")}
    for one in ("negative", "mirrored", "pretraining"):
        value, plain = record.metrics[f"{name}/{one}"], without[f"wasserstein/{one}"]
        assert value is not None
        assert plain is not None
        assert value >= plain * (1 - 1e-9)
    matrices = read_matrices([tmp_path])
    assert {one.distance for one in matrices} == {name}
    rows = correlation_table(correlations(matrices)).rows
    assert {row["distance"] for row in rows} == {name}
    picture = distance_figure(matrices, tmp_path / "distances")
    assert DISTANCE_NAMES[name] in picture.caption
    with pytest.raises(InputError, match="different distances"):
        distance_figure([*matrices, *read_matrices([done])], tmp_path / "both")


def test_a_stopped_run_resumes_and_ends_the_same(
    world: Path, start: Checkpoint, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Learner.step, 0

    def step_then_stop(self: Learner, batch: Any) -> None:
        nonlocal steps
        step(self, batch)
        steps += 1
        if steps == 5:  # the first set has 4 steps: in the second cell
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Learner, "step", step_then_stop)
    with pytest.raises(PreemptedError):
        protocol(world, start, tmp_path, ["wise_ft_1"])
    kept = sorted(path.parent for path in tmp_path.rglob("record.json"))
    assert [path.relative_to(tmp_path).as_posix() for path in kept] == [
        "start/distances",
        "start/fine_tuning/negative/seed_0",
        "start/pretrained",
    ]
    times = {path: (path / "record.json").stat().st_mtime_ns for path in kept}
    protocol(world, start, tmp_path, ["wise_ft_0", "wise_ft_1"])
    assert {path: (path / "record.json").stat().st_mtime_ns for path in kept} == times
    for path in done.rglob("record.json"):
        other = RunRecord.read(tmp_path / path.relative_to(done))
        assert other.metrics == RunRecord.read(path).metrics
    for path in done.rglob("checkpoint.pt"):
        other_weights = load_tensors(tmp_path / path.relative_to(done))["state_dict"]
        assert_same(load_tensors(path)["state_dict"], other_weights)
    assert not list(tmp_path.rglob("lock.json"))


def test_another_process_cell_is_waited_for(world: Path, start: Checkpoint, done: Path, tmp_path: Path) -> None:
    """What needs it waits too; the rest goes on meanwhile."""
    held = tmp_path / "start/fine_tuning/mirrored/seed_0"
    protocol(world, start, tmp_path, [])
    worker = threading.Thread(target=protocol, args=(world, start, tmp_path, ["wise_ft_1"]))
    with lock(held / "lock.json"):
        worker.start()
        other = tmp_path / "start/wise_ft_1/negative/seed_0/record.json"
        end = time.monotonic() + 120
        while not other.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert other.exists()
        assert not (held / "record.json").exists()
        assert not (tmp_path / "start/wise_ft_1/mirrored").exists()
    worker.join()
    for name in ("fine_tuning", "wise_ft_1"):
        place = Path("start", name, "mirrored/seed_0/record.json")
        assert RunRecord.read(tmp_path / place).metrics == RunRecord.read(done / place).metrics


def test_images_that_the_sets_share_are_told(
    world: Path, start: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(root: Path) -> list[str]:
        with pytest.raises(InputError, match="less than a batch"):
            protocol(root, start, tmp_path / "out", ["fine_tuning"], batch_size=18)
        return capsys.readouterr().out.splitlines()

    assert said(world) == []
    shutil.copytree(world, tmp_path / "world")
    root, told = tmp_path / "world", []
    for source, part in (("pretraining/train", "pretraining/val"), ("negative", "mirrored")):
        first, copy = min((root / source / "circle").iterdir()), root / part / "cross/copy.png"
        shutil.copy(first, copy)
        told.append(
            f"warning: {root / part} shares 1 image with {root / source}, the first: {copy}, the same image as "
        )
        told[-1] += f"{first}; accuracy on them does not tell of others"
    assert said(root) == told


def test_what_cannot_be_run_is_refused(world: Path, start: Checkpoint, done: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    with pytest.raises(InputError, match=r"holds another run \(lr is 0.01 there"):
        protocol(world, start, done, ["fine_tuning"], lr=0.5)
    other = tmp_path / "other"
    for name in ("pretraining", "negative", "mirrored"):
        negatives(world / name, other) if name == "negative" else shutil.copytree(world / name, other / name)
    with pytest.raises(InputError, match=r"another run \(data_fingerprint.negative is [^,]*\): choose"):
        protocol(other, start, done, ["fine_tuning"])
    shutil.rmtree(other)
    with pytest.raises(InputError, match="16 images to train on, less than a batch"):
        protocol(world, start, tmp_path, ["fine_tuning"], batch_size=17)
    with pytest.raises(InputError, match="classifier"):
        body = {name: tensor for name, tensor in start.state_dict.items() if not name.startswith("fc.")}
        headless = replace(start, spec=replace(SPEC, num_classes=0), state_dict=body)
        protocol(world, headless, tmp_path, ["fine_tuning"])
    with pytest.raises(InputError, match="unknown method 'dropout'"):
        protocol(world, start, tmp_path, ["dropout"])
    with pytest.raises(InputError, match=r"val has the class circle where .* knows cross"):
        named = replace(start, classes=("cross", "circle", "square", "triangle"))
        protocol(world, named, tmp_path, ["fine_tuning"])
    with pytest.raises(InputError, match="4 classes, but the backbone knows 7"):
        protocol(world, replace(start, spec=replace(SPEC, num_classes=7)), tmp_path, ["fine_tuning"])
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    assert not list(tmp_path.iterdir())


# --- corruptions and detectors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [("image_size", -1), ("val_resize", 200), ("limit", -1), ("precision", "fp16"), ("seed", 2**63)], ids=str
)
def test_corruptions_of_no_images_are_refused(option: tuple[str, Any]) -> None:
    with pytest.raises(InputError, match=option[0]):
        CorruptionConfig(**{"image_size": 224, option[0]: option[1]})


def test_mean_corruption_error_by_hand() -> None:
    """Twice the errors under the first corruption, half of them under the others: (2 + 14 / 2) / 15 = 60 %."""
    rng = np.random.default_rng(0)
    reference = {f"{c}-{s}": float(rng.uniform(10, 45)) for c in CORRUPTIONS for s in SEVERITIES}
    errors = {name: value * (2 if name.startswith(CORRUPTIONS[0]) else 0.5) for name, value in reference.items()}
    assert mean_corruption_error(errors, reference) == pytest.approx(60)
    assert mean_corruption_error(reference, reference) == pytest.approx(100)
    with pytest.raises(InputError, match="fog"):
        mean_corruption_error(reference, {n: 0.0 if n.startswith("fog") else v for n, v in reference.items()})


def detector_file(start: Checkpoint, backbone: dict[str, Tensor], path: Path) -> Path:
    """What Detectron2 leaves of a detector that started from ``start``: its own prefix, and other layers beside."""
    tensors, _ = convert(replace(start, state_dict=backbone))
    model = {f"backbone.bottom_up.{name}": tensor for name, tensor in tensors.items()}
    model["backbone.fpn_output2.weight"] = torch.ones(8, 8, 3, 3)
    torch.save({"model": model, "backbone_metadata": BackboneMetadata.of(start).to_dict(), "iteration": 9}, path)
    return path


def test_a_detectors_backbone_gets_its_classifier_back(
    start: Checkpoint, fine_tuned: dict[str, Tensor], images: Tensor, tmp_path: Path
) -> None:
    changed = {**fine_tuned, "fc.weight": torch.zeros_like(fine_tuned["fc.weight"])}
    found = with_own_classifier(detector_file(start, changed, tmp_path / "model_final.pth"), start)
    with torch.no_grad():
        model = model_of(start)
        for name, tensor in model.backbone.state_dict().items():
            if not name.startswith("fc."):
                tensor.copy_(fine_tuned[name])
        assert torch.equal(model_of(found)(images), model(images))
    unchanged = with_own_classifier(detector_file(start, start.state_dict, tmp_path / "same.pth"), start)
    assert torch.equal(model_of(unchanged)(images), model_of(start)(images))
    assert unchanged.source_sha256 != start.source_sha256
    with pytest.raises(InputError, match="another file than start"):
        with_own_classifier(tmp_path / "same.pth", replace(start, source_sha256="0" * 64))
    with pytest.raises(InputError, match="no classifier to put back"):
        with_own_classifier(tmp_path / "same.pth", replace(start, spec=replace(SPEC, num_classes=0)))


# --- the tool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sketch", "cartoon", "impulse_noise-2"])
def test_made_images_are_the_same_every_time(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 4)
    image = cv2.normalize(image, np.empty_like(image), 0, 255, cv2.NORM_MINMAX)
    before = image.copy()
    made = apply(image, kind, name="a/b.png", seed=1)
    assert made.shape == image.shape
    assert made.dtype == np.uint8
    assert np.array_equal(apply(image, kind, name="a/b.png", seed=1), made)
    assert np.array_equal(image, before)
    assert not np.array_equal(made, image)
    if kind == "sketch":
        assert np.array_equal(made[..., 0], made[..., 2])
        assert np.median(made) > 200  # white paper
    elif kind == "cartoon":
        assert len(np.unique(made)) <= 6
    else:
        assert np.array_equal(
            made, corrupt(image, "impulse_noise", 2, seed=image_seed("a/b.png", "impulse_noise", 2, 1))
        )
        assert not np.array_equal(apply(image, kind, name="a/c.png", seed=1), made)


def test_the_whole_tool(run_tool: Run, world: Path, start: Checkpoint, tmp_path: Path) -> None:
    backbone = tmp_path / "robust.pt"
    write_checkpoint(backbone, spec=SPEC, state_dict=start.state_dict, threat_model=start.threat_model)
    sets, output, tables = (tmp_path / name for name in ("sets", "run", "tables"))
    make = ["make-sets", world / "pretraining/val", "--output", sets, "--kinds", "sketch", "cartoon", "fog-3"]
    make += ["--images-per-class", 3, "--workers", 0]
    status, out, _ = run_tool("inheritance", *make)
    assert (status, out.splitlines()[-1]) == (0, f"3 sets written to {sets}")
    assert len(list(sets.glob("*/*/*.png"))) == 3 * 4 * 3
    stamps = {path: path.stat().st_mtime_ns for path in sets.rglob("*")}
    assert run_tool("inheritance", *make)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in sets.rglob("*")} == stamps

    arguments = ["run", backbone, "--pretraining", world / "pretraining", "--sets", *sorted(sets.iterdir()), *OPTIONS]
    arguments += ["--methods", "linear_probe", "wise_ft", "--output", output]
    status, out, err = run_tool("inheritance", *arguments)
    assert status == 0, err
    assert out.splitlines()[-1] == f"11 records written to {output}"  # 2 + 3 sets x 3 methods
    status, again, _ = run_tool("inheritance", *arguments)
    assert status == 0
    assert again.splitlines()[-5:] == out.splitlines()[-5:]

    methods = ["--methods", "linear_probe", "wise_ft"]
    status, out, _ = run_tool("inheritance", "table", output, "--output", tables, *methods)
    assert status == 0
    assert "fine_tuning" not in out
    assert out.splitlines()[-1] == f"tables and figures written to {tables}"
    assert (tables / "inheritance.md").read_text() in out
    for name in ("robust_changes", "robust_distances"):
        assert (tables / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tables / f"{name}.svg").read_text().endswith("</svg>\n")
    rows = [line.split(",") for line in (tables / "accuracies.csv").read_text().splitlines()]
    assert len(rows) == 1 + 2 * 3 * 4
    for row in rows[1:]:
        record = RunRecord.read(output / "robust" / row[1] / row[3] / "seed_0/record.json")
        assert float(row[6]) == record.metrics[f"accuracy/{row[4]}"]
        assert float(row[7]) == float(row[6]) - float(row[5])
    changes = {(row[1], row[3], row[4]): float(row[7]) for row in rows[1:]}
    drawn = [line.split(",") for line in (tables / "robust_changes.csv").read_text().splitlines()[1:]]
    assert {tuple(row[:3]): float(row[3]) for row in drawn} == changes
    drawn = [line.split(",") for line in (tables / "robust_distances.csv").read_text().splitlines()[1:]]
    assert {(row[1], row[2], PRETRAINING): -float(row[5]) for row in drawn} == {
        key: change for key, change in changes.items() if key[2] == PRETRAINING
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_without_room_for_a_set_is_one_sentence(
    run_tool: Run, world: Path, tmp_path: Path, workers: int
) -> None:
    with disk_of("size=16k", tmp_path / "disk") as disk:
        make = ["make-sets", world / "pretraining/val", "--output", disk, "--kinds", "photograph"]
        status, _, err = run_tool("inheritance", *make, "--workers", workers)
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith(f"error: {disk}/.photograph.unfinished/")
    assert "no space left on device: make room" in err


def test_disjoint_sets_share_no_photograph(run_tool: Run, world: Path, tmp_path: Path) -> None:
    val = world / "pretraining/val"
    make = ["make-sets", val, "--kinds", "photograph", "sketch", "cartoon", "--images-per-class", 1, "--workers", 0]

    def photographs(output: Path, *more: str) -> list[set[str]]:
        status, _, err = run_tool("inheritance", *make, "--output", output, *more)
        assert status == 0, err
        kinds = (output / kind for kind in ("photograph", "sketch", "cartoon"))
        return [{str(path.relative_to(kind)) for path in kind.glob("*/*.png")} for kind in kinds]

    first, *others = photographs(tmp_path / "same")
    assert others == [first, first]
    apart = photographs(tmp_path / "apart", "--disjoint")
    assert [len(one) for one in apart] == [len(first)] * 3
    assert len(set.union(*apart)) == 3 * len(first)
    for path in (tmp_path / "apart/photograph").glob("*/*.png"):
        original = val / path.parent.name / path.stem
        assert np.array_equal(cv2.imread(str(path)), cv2.imread(str(original)))


def test_images_of_one_name_in_folders_of_a_class_are_all_made(tmp_path: Path) -> None:
    for level, place in enumerate(["cat/0.png", "cat/left/0.png", "cat/left/1.png", "dog/0.png"]):
        _write(tmp_path / "source" / place, np.full((8, 8, 3), 50 * level, np.uint8))
    assert make_set(tmp_path / "source", tmp_path, "photograph", workers=0) == 4
    made = open_related_set(tmp_path / "photograph", ("cat", "dog"), val_transform(8, resize=8)).images
    assert [(int(made[i][0][0, 0, 0]), made.labels[i]) for i in range(4)] == [(100, 0), (0, 0), (50, 0), (150, 1)]
    assert make_set(tmp_path / "source", tmp_path, "photograph", workers=0) == 4
    for level, path in enumerate(sorted((tmp_path / "source").rglob("*.png"))):  # as many others from a like folder
        _write(path, np.full((8, 8, 3), 10 * level + 5, np.uint8))
    for said in ("photograph holds another set", "cannot read .*made.json"):
        with pytest.raises(InputError, match=said):
            make_set(tmp_path / "source", tmp_path, "photograph", workers=0)
        (tmp_path / "photograph/made.json").write_text("{")


def test_the_tool_says_what_is_wrong(run_tool: Run, world: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        status, _, err = run_tool("inheritance", *arguments)
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    val, here = world / "pretraining/val", ["--output", tmp_path / "out"]
    assert "did you mean fog" in refused("make-sets", val, *here, "--kinds", "sketch", "fogg-3")
    assert "unknown kind 'fog-9'" in refused("make-sets", val, *here, "--kinds", "fog-9")
    disjoint = ["make-sets", val, *here, "--kinds", "sketch", "cartoon", "--disjoint"]
    assert "give --images-per-class" in refused(*disjoint)
    assert "too few for 90 in other sets" in refused(*disjoint, "--images-per-class", "90", "--workers", 0)
    assert "no finished cells" in refused("table", tmp_path, *here)
    run = ["run", "none.pt", "--pretraining", world / "pretraining", *here, *OPTIONS]
    assert "--data-root" in refused(*run, "--sets", "imagenet-r", "imagenet-a")
    two = ("--sets", world / "negative", world / "mirrored")
    assert "memory_gb must be >= 0" in refused(*run, *two, "--memory-gb", -1)
    assert "none.pt" in refused(*run, "--sets", world / "negative", world / "mirrored")
    assert not (tmp_path / "out").exists()


def test_the_tool_measures_corruptions_and_detectors(
    run_tool: Run,
    world: Path,
    start: Checkpoint,
    fine_tuned: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("brightness", "contrast"))
    monkeypatch.setattr(corruptions, "SEVERITIES", (1, 5))
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    for path, weights in ((first, start.state_dict), (second, fine_tuned)):
        write_checkpoint(path, spec=SPEC, state_dict=weights, threat_model=start.threat_model)
    data = ["--data", world / "pretraining/val", "--image-size", 32, "--val-resize", 32, "--workers", 0]
    data += ["--limit", 3, "--device", "cpu"]
    status, out, _ = run_tool("inheritance", "corruptions", first, *data, "--output", tmp_path / "a")
    assert status == 0
    assert out.splitlines()[-1] == f"record written to {tmp_path / 'a/record.json'}"
    reference = RunRecord.read(tmp_path / "a/record.json")
    assert len(reference.metrics) == 6  # clean, four and their mean
    cells = [RunRecord.read(path).metrics["accuracy"] for path in (tmp_path / "a/cells").glob("*-*/record.json")]
    assert len(cells) == 4
    assert reference.metrics["mean_accuracy"] == pytest.approx(np.mean([cell or 0.0 for cell in cells]))
    given = ["inheritance", "corruptions", second, *data, "--reference", tmp_path / "a/cells/clean/record.json"]
    status, _, err = run_tool(*given, "--output", tmp_path / "b")
    assert (status, "the reference a/clean has no accuracy under brightness-1" in err) == (2, True)
    given[-1] = tmp_path / "a/record.json"
    given[4] = negatives(world / "pretraining/val", tmp_path)
    status, _, err = run_tool(*given, "--output", tmp_path / "b")
    assert (status, "other images (it differs in data_fingerprint)" in err) == (2, True)

    backbone = read_checkpoint(first)
    detector = detector_file(backbone, dict(fine_tuned), tmp_path / "model_final.pth")
    arguments = ["detector", detector, first, *data, "--threat-model", "L2:0.5", "--no-autoattack"]
    status, out, err = run_tool("inheritance", *arguments, "--output", tmp_path / "c", "--attack.steps", 2)
    assert status == 0, err
    assert out.splitlines()[-1] == f"records written to {tmp_path / 'c'}"
    before, after = (RunRecord.read(tmp_path / "c" / name / "record.json") for name in ("before", "after"))
    assert before.backbone["source_sha256"] == backbone.source_sha256 != after.backbone["source_sha256"]
    assert before.config["threat_model"] == after.config["threat_model"] == "L2:0.5"


# --- correlation -----------------------------------------------------------------------------------------------------


def test_correlation_by_hand() -> None:
    x, y = [1.0, 2.0, 4.0, 5.0, 9.0], [2.0, 1.0, 3.0, 7.0, 6.0]
    mx, my = sum(x) / 5, sum(y) / 5
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    r = covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    one = correlate(list(zip(x, y, strict=True)))
    assert one.r == pytest.approx(r)
    assert one.r_squared == pytest.approx(r**2)
    # Ranks of y are 2 1 3 5 4: 1 - 6 (1 + 1 + 0 + 1 + 1) / (5 x 24) = 0.8.
    assert one.spearman == pytest.approx(0.8)
    half = 1.959964 / math.sqrt(5 - 3)
    assert one.low == pytest.approx(math.tanh(math.atanh(r) - half), abs=1e-5)
    assert one.high == pytest.approx(math.tanh(math.atanh(r) + half), abs=1e-5)
    assert correlate([(1.0, 2.0), (2.0, 3.0)]).r is None
    assert correlate([(1.0, 2.0), (2.0, 3.0), (4.0, 1.0)]).low is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=5))
@settings(max_examples=8, deadline=None)
def test_p_of_few_pairs_is_exact(points: list[tuple[int, int]]) -> None:
    x, y = zip(*points, strict=True)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    exact = stats.permutation_test(
        (x,), lambda order: stats.spearmanr(order, y).statistic, permutation_type="pairings", vectorized=False
    )
    # SciPy doubles the smaller tail; here both tails are counted as they are.
    both = np.mean(np.abs(exact.null_distribution) >= abs(exact.statistic) - 1e-9)
    assert permutation_p(x, y) == pytest.approx(both)
    assert correlate(points).spearman_p == permutation_p(x, y)


def test_four_pairs_cannot_be_significant() -> None:
    assert permutation_p([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24)
