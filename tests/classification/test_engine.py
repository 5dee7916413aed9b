"""The training and evaluation loops, against slow ones and on a task they must learn."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.compute import Compute, _say_once_float32
from robust_backbones.classification.cuda_graph import GraphedGradients
from robust_backbones.classification.engine import Learner, Totals, evaluate, train_one_epoch
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.errors import DivergedError, InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.pretended_gpu import PretendedGraph, pretended_gpu
from tests.transfer.conftest import narrow, train

CPU = Compute(torch.device("cpu"))
ATTACK, PGD, L2 = AttackConfig(steps=2), ObjectiveConfig(), ThreatModel("L2", 0.5)
SPEC = BackboneSpec("resnet18", 3)
Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, size: int = 8) -> list[Batch]:
    """uint8 batches whose class is that of the brightest channel."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        labels = torch.randint(0, 3, (size,), generator=generator)
        images = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
        images[torch.arange(len(labels)), labels] += 110
        out.append((images, labels))
    return out


def noisy_batches(images: Tensor, labels: Tensor, count: int, size: int) -> list[Batch]:
    """uint8 batches of a trained network's images under noise, which keeps it from being sure of itself."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        rows = torch.randint(0, len(images), (size,), generator=generator)
        noisy = images[rows] + 0.4 * torch.randn(images[rows].shape, generator=generator)
        out.append(((255 * noisy.clamp(0, 1)).to(torch.uint8), labels[rows]))
    return out


def resnet() -> NormalizedModel:
    return NormalizedModel(build_backbone(SPEC), SPEC)


def small(norm: bool = True) -> NormalizedModel:
    """One convolution and a classifier, with or without a batch norm between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, stride=4), *([nn.BatchNorm2d(16)] if norm else []), nn.ReLU()]
        return NormalizedModel(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)), SPEC)


def learner(
    model: NormalizedModel,
    threat_model: ThreatModel = L2,
    *,
    lr: float = 0.05,
    objective: ObjectiveConfig = PGD,
    attack: AttackConfig = ATTACK,
    compute: Compute = CPU,
    **options: float,
) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    return Learner(model, optimizer, scheduler, objective.build(attack), threat_model, compute, **options)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def reference_losses(model: NormalizedModel, data: list[Batch], epsilon: float, rate: float) -> Iterator[float]:
    """The recipe at an l2 epsilon in plain PyTorch: nothing folded, perturbation and momentum kept by hand."""
    momenta = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for images, labels in data:
        x, delta = images / 255, torch.zeros(images.shape)
        model.eval()
        for _ in range(3):
            delta.requires_grad_()
            loss = F.cross_entropy(model(x + delta), labels)
            (gradient,) = torch.autograd.grad(loss, delta)
            # An image that the network is quite sure of has no gradient, and keeps its place.
            norms = gradient.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-30)
            delta = delta.detach() + 2 / 3 * epsilon * gradient / norms
            length = delta.flatten(1).norm(dim=1)[:, None, None, None].clamp(min=1e-30)
            delta = delta * (epsilon / length).clamp(max=1)
            delta = (x + delta).clamp(0, 1) - x
        model.train()
        loss = F.cross_entropy(model(x + delta), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, momentum, gradient in zip(model.parameters(), momenta, gradients, strict=True):
                momentum.mul_(0.9).add_(gradient + 1e-4 * parameter)
                parameter.sub_(rate * momentum)
        yield loss.item()


@pytest.mark.slow
def test_fifty_steps_follow_a_slow_reference_of_the_recipe(
    trained: tuple[NormalizedModel, Tensor, Tensor], tmp_path: Path
) -> None:
    """As trajectories within 1e-3, relative: folding, channels-last and our bookkeeping change nothing but rounding.

    From a trained network and with small steps: on random weights each step multiplies any rounding a hundredfold, and
    plain PyTorch departs from itself as soon as only its memory format changes. A narrow one: its steps are as many.
    """
    with narrow():
        start = read_checkpoint(train(tmp_path)).model()
    data, rate, epsilon = noisy_batches(*trained[1:], 50, 16), 5e-4, 0.05
    expected = list(reference_losses(copy.deepcopy(start), data, epsilon, rate))
    model = copy.deepcopy(start).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    objective = ObjectiveConfig().build(AttackConfig())
    ours: list[float] = []
    train_one_epoch(
        Learner(model, optimizer, scheduler, objective, ThreatModel("L2", epsilon), CPU),
        data,
        steps=50,
        log_period=1,
        on_log=lambda step, totals: ours.append(totals.metrics()["train_loss"]),
    )
    difference = torch.tensor(ours) - torch.tensor(expected)
    assert difference.norm() < 1e-3 * torch.tensor(expected).norm()
    assert ours == pytest.approx(expected, rel=5e-3)  # nor does any one loss stray
    assert sum(ours[-10:]) < 0.9 * sum(ours[:10])  # and it learns, so there was a way to go


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(accumulate: int) -> None:
    """Without batch norm the gradient is exactly that of the whole batch, for every way to split it."""
    data = batches(4)
    parts = [
        (x, y) for images, labels in data
        for x, y in zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
    ]  # fmt: skip
    whole, split = learner(small(norm=False)), learner(small(norm=False))
    totals: list[Totals] = []
    train_one_epoch(whole, data, steps=4)
    train_one_epoch(split, parts, steps=4, accumulate=accumulate, on_log=lambda step, t: totals.append(t))
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert totals[0].images == 32
    assert split.step_count == 4


@pytest.mark.parametrize(
    ("kind", "precision"), [("pgd", "fp32"), ("free", "fp32"), ("trades", "fp32"), ("fast", "fp32"), ("pgd", "fp16")]
)
@pytest.mark.parametrize("cut", [1, 3])
def test_state_is_all_there_is(kind: str, precision: str, cut: int) -> None:
    """k steps, state out, state into a new learner, the rest: bit for bit the unbroken run, dropout included."""

    def new() -> Learner:
        model = small()
        model.backbone.insert(5, nn.Dropout(0.5))
        attack = AttackConfig(steps=1, random_start=True)
        return learner(
            model,
            objective=ObjectiveConfig(kind, replays=2),
            attack=attack,
            compute=Compute(torch.device("cpu"), precision),
            ema_decay=0.8,
            epsilon_warmup_steps=3,
        )

    data = batches(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unbroken = new()
        train_one_epoch(unbroken, data, steps=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = new()
        train_one_epoch(first, data, steps=cut)
        state = copy.deepcopy(first.state_dict())
    second = new()  # its generators stand elsewhere
    torch.rand(7)
    second.load_state_dict(state)
    train_one_epoch(second, data[cut:], steps=5, first_step=cut)
    assert same_weights(second.model, unbroken.model)
    assert same_weights(second.evaluated, unbroken.evaluated)
    assert not same_weights(first.model, unbroken.model)


def test_epsilon_grows_to_its_full_size() -> None:
    one = learner(small(), ThreatModel("Linf", 0.04), epsilon_warmup_steps=3)
    epsilons = []
    for batch in batches(5):
        epsilons.append(one.threat_model.epsilon)
        one.step([batch])
    assert epsilons == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04])


def test_averaged_weights_are_the_exponential_average() -> None:
    one = learner(small(), ema_decay=0.7)
    average = None
    for batch in batches(4):
        one.step([batch])
        weight = one.model.backbone[0].weight.detach()
        average = weight.clone() if average is None else 0.7 * average + 0.3 * weight
    torch.testing.assert_close(one.evaluated.backbone[0].weight, average)
    assert torch.equal(one.evaluated.backbone[1].running_mean, one.model.backbone[1].running_mean)


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "fp16"))]
)
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_it_learns(precision: str, epsilon: float) -> None:
    compute = Compute(torch.device("cpu"), precision)
    one = learner(small(), ThreatModel("L2", epsilon), lr=0.1, compute=compute)
    one.scheduler = torch.optim.lr_scheduler.ConstantLR(one.optimizer, 1.0)
    losses: list[float] = []
    for _ in range(30):
        train_one_epoch(one, batches(), steps=3, on_log=lambda step, t: losses.append(t.metrics()["train_loss"]))
    assert losses[-1] < 0.3
    accuracy = evaluate(one.model, batches(), ThreatModel("L2", epsilon), ATTACK, compute)
    assert accuracy["clean_accuracy"] > 90
    assert accuracy["robust_accuracy"] > 80
    assert all(parameter.dtype == torch.float32 for parameter in one.model.parameters())


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_float32_where_it_would_be_software(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robust_backbones.classification.compute.computes_bfloat16", lambda: native)
    _say_once_float32.cache_clear()
    compute = Compute(torch.device("cpu"), "fp32", "bf16")
    assert compute.dtype == torch.float32
    assert capsys.readouterr() == ("", "")
    arithmetic = torch.bfloat16 if native else torch.float32
    assert compute.attack_dtype == Compute(torch.device("cpu"), "bf16").dtype == arithmetic
    with Compute(torch.device("cpu"), "bf16").autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == arithmetic
    out, err = capsys.readouterr()
    assert (out, err.count("float32")) == ("", not native)
    assert Compute(torch.device("cuda"), "bf16").dtype == torch.bfloat16


# Not every instruction that the processor says it has is tried out with the compiler first.
@torch._inductor.config.patch({"cpp.vec_isa_ok": True})
@pytest.mark.slow
def test_compiled_networks_learn_the_same() -> None:
    """torch.compile is for GPUs, where it pays; that it changes nothing shows on a CPU as well."""
    plain, compiled = (
        learner(small(), compute=Compute(torch.device("cpu"), compile_mode=mode)) for mode in ("", "default")
    )
    for one in (plain, compiled):
        train_one_epoch(one, batches(), steps=3)
    for first, second in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pgd", "fast", "trades"])
def test_the_steps_of_a_cuda_graph_are_the_steps_themselves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that changes between steps: images, rate, weights, statistics, random starts, epsilon, a resumption.

    To the bit, the operations being the same.
    """
    monkeypatch.setattr(PretendedGraph, "replays", 0)
    monkeypatch.setattr("torch.compile", lambda model, mode: model)  # knows no pretended tensors
    data, options = batches(24, size=4), {"epsilon_warmup_steps": 2, "ema_decay": 0.9}
    objective, attack = ObjectiveConfig(kind), replace(ATTACK, random_start=True)
    results = []
    for mode in ("", "cuda-graphs"):
        with pretended_gpu() if mode else nullcontext():
            compute = Compute(torch.device("cuda" if mode else "cpu"), compile_mode=mode)
            one = learner(compute.place(small()), objective=objective, attack=attack, compute=compute, **options)
            for first in range(0, 24, 2):
                if first == 16:
                    one.load_state_dict(copy.deepcopy(one.state_dict()))
                one.step(data[first : first + 2])
            totals, bad_step = one.meter.read()
            assert bad_step is None
            held = [getattr(value, "held", value) for value in one.evaluated.state_dict().values()]
            results.append((torch.cat([value.flatten().double() for value in held]), totals.loss))
    assert PretendedGraph.replays == 12 - 2 - GraphedGradients.WARM_UP  # without those in which epsilon grows
    assert torch.equal(*(weights for weights, _ in results))
    assert results[0][1] == results[1][1]


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    data = batches(6)
    one = learner(small())

    def poisoned() -> Iterator[Batch]:
        for index, batch in enumerate(data):
            if index == 3:
                with torch.no_grad():
                    one.model.backbone[-1].bias.fill_(torch.nan)
            yield batch

    logged: list[int] = []
    with pytest.raises(DivergedError, match=r"step 4 is not finite \(learning rate 0.025\)"):
        train_one_epoch(one, poisoned(), steps=6, on_log=lambda step, t: logged.append(step))
    assert not logged  # nothing may be saved


def test_one_value_a_channel_is_one_sentence() -> None:
    """As of a single image, or the last one of an epoch, whose last stage is 1 x 1."""
    images, labels = batches(1)[0]
    with pytest.raises(InputError, match=r"one value a channel.*larger"):
        learner(resnet()).step([(images[:1], labels[:1])])


@pytest.mark.parametrize(("bias", "diverges"), [(9.0, False), (13.0, True)])
def test_ten_times_the_loss_of_chance_is_divergence(bias: float, diverges: bool) -> None:
    """With all images of class 0 and the others' logits raised by b, the loss is about b + log 2; 10 log 3 is 11."""
    one = learner(small(), ThreatModel(), lr=0.0)
    with torch.no_grad():
        one.model.backbone[-1].weight.zero_()
        one.model.backbone[-1].bias.copy_(torch.tensor([0, bias, bias]))
    data = [(images, torch.zeros_like(labels)) for images, labels in batches()]
    with pytest.raises(DivergedError, match="diverges") if diverges else nullcontext():
        train_one_epoch(one, data, steps=3, classes=3)


def test_the_loss_scale_is_part_of_the_state() -> None:
    first, second = (learner(small(), compute=Compute(torch.device("cpu"), "fp16")) for _ in range(2))
    first.step([batches(1)[0]])
    first._scaler.update(128.0)
    second.load_state_dict(first.state_dict())
    assert second._scaler.get_scale() == 128


@pytest.mark.parametrize("epsilon", [0, 0.5])
def test_batch_norms_are_folded_for_an_attack_alone(monkeypatch: pytest.MonkeyPatch, epsilon: float) -> None:
    folded: list[object] = []
    original = FoldedTwin.refresh
    monkeypatch.setattr(FoldedTwin, "refresh", lambda twin: folded.append(twin) or original(twin))
    learner(small(), ThreatModel("L2", epsilon)).step([batches(1)[0]])
    assert len(folded) == 2 * (epsilon > 0)


def test_a_request_to_stop_is_heard_at_once() -> None:
    logged: list[int] = []
    one = learner(small())
    train_one_epoch(
        one, batches(4), steps=4, on_log=lambda step, t: logged.append(step), stop=lambda: one.step_count == 2
    )
    assert logged == [2, 4]


def test_statistics_of_frozen_norms_are_left_alone() -> None:
    """A mean of equal numbers may differ from them in the last digit, here a little more."""
    model = small()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = torch.full_like(norms[0].running_mean, 0.1)
    three = SimpleNamespace(size=3, sum=lambda tensor: (tensor + tensor + tensor) * (1 + 1e-6))
    for training in (False, True):
        model.train(training)
        norms[0].running_mean.copy_(before)
        Learner._average_batch_norm_statistics(SimpleNamespace(model=model, processes=three))  # type: ignore[arg-type]
        assert torch.equal(norms[0].running_mean, before) != training


@pytest.mark.slow
def test_accuracies_are_those_of_a_slow_count() -> None:
    model = resnet()
    train_one_epoch(learner(model, ThreatModel(), lr=0.01), batches(), steps=3)
    threat_model = ThreatModel("Linf", 8 / 255)
    data = [(images[: 8 - index], labels[: 8 - index]) for index, (images, labels) in enumerate(batches())]
    metrics = evaluate(model, data, threat_model, ATTACK, CPU)
    by_class = evaluate(model, data, threat_model, ATTACK, CPU, metric="mean_per_class")
    assert model.training  # given back as it was

    model.eval()
    outcomes: dict[int, list[tuple[bool, bool]]] = {}
    for images, labels in data:
        for image, label in zip(images / 255, labels, strict=True):
            adversarial = pgd(model, image[None], label[None], threat_model, ATTACK)
            right = bool(model(image[None]).argmax() == label)
            still_right = right and bool(model(adversarial).argmax() == label)
            outcomes.setdefault(int(label), []).append((right, still_right))
    for place, name in enumerate(("clean_accuracy", "robust_accuracy")):
        answers = {label: [pair[place] for pair in pairs] for label, pairs in outcomes.items()}
        count = sum(len(of_class) for of_class in answers.values())
        assert metrics[name] == pytest.approx(100 * sum(sum(of_class) for of_class in answers.values()) / count)
        shares = [sum(of_class) / len(of_class) for of_class in answers.values()]
        assert by_class[name] == pytest.approx(100 * sum(shares) / len(shares))
    assert metrics != by_class  # classes are of different sizes


def test_robust_is_clean_at_epsilon_zero(small_model: NormalizedModel) -> None:
    metrics = evaluate(small_model, batches(), ThreatModel("L2", 0), ATTACK, CPU)
    assert metrics["clean_accuracy"] == metrics["robust_accuracy"]


@pytest.mark.parametrize("wrong", [{"precision": "fp8"}, {"attack_precision": "fp8"}, {"compile_mode": "fast"}])
def test_what_cannot_be_computed_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InputError, match="choose one of"):
        Compute(torch.device("cpu"), **wrong)
