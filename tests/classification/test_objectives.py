"""Each objective against its paper's equation, computed slowly and with the perturbation kept apart."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.classification.objectives import MicroBatch, ObjectiveConfig
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms

LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5)
ATTACK = AttackConfig(steps=2)


@pytest.fixture
def network() -> NormalizedModel:
    """In float64 (rounding must not decide signs), with statistics that a batch's own differ from."""
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec)
    randomize_batch_norms(model)
    return model.double()


class Adversary(nn.Module):
    """The network in eval mode, as attacks see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]

    def forward(self, images: Tensor) -> Tensor:
        modes = [(module, module.training) for module in self._model[0].modules()]
        self._model[0].eval()
        logits = self._model[0](images)
        for module, mode in modes:
            module.training = mode
        return logits


def same(network: NormalizedModel) -> NormalizedModel:
    """A copy: a pass in train mode changes the statistics that the next attack would see."""
    return copy.deepcopy(network)


def gradient_of(loss: Tensor, point: Tensor) -> Tensor:
    return torch.autograd.grad(loss, point)[0]


def project(delta: Tensor, threat_model: ThreatModel) -> Tensor:
    """The ball's nearest point, one image at a time."""
    if threat_model.norm == "Linf":
        return delta.clamp(-threat_model.epsilon, threat_model.epsilon)
    return torch.stack([d * min(1.0, threat_model.epsilon / max(1e-12, float(d.norm()))) for d in delta])


def direction(gradient: Tensor, threat_model: ThreatModel) -> Tensor:
    if threat_model.norm == "Linf":
        return gradient.sign()
    return torch.stack([g / g.norm() for g in gradient])


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pgd_is_the_loss_at_the_worst_point(
    network: NormalizedModel, images: Tensor, labels: Tensor, threat_model: ThreatModel, smoothing: float
) -> None:
    """Madry et al. 2018, eq. 2.1; with label smoothing, the inner maximum is of the same smoothed loss."""
    images = images.double()

    def smoothed(logits: Tensor) -> Tensor:
        target = (1 - smoothing) * F.one_hot(labels, 4) + smoothing / 4
        return -(target * F.log_softmax(logits, 1)).sum(1)

    delta = torch.zeros_like(images)
    for _ in range(ATTACK.steps):
        point = (images + delta).requires_grad_()
        gradient = gradient_of(smoothed(Adversary(network)(point)).sum(), point)
        step = ATTACK.relative_step_size * threat_model.epsilon * direction(gradient, threat_model)
        delta = (images + project(delta + step, threat_model)).clamp(0, 1) - images
    expected = smoothed(same(network).train()(images + delta)).mean()

    objective = ObjectiveConfig(label_smoothing=smoothing).build(ATTACK)
    loss, logits = objective.loss(network.train(), Adversary(network), MicroBatch(images, labels, threat_model))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.shape == (4, 4)


def test_fast_is_one_step_from_a_random_start(network: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """Wong et al. 2020, algorithm 3: δ = Π(δ0 + 1.25 ε sign ∇), δ0 uniform in the ball; ``attack`` plays no part."""
    images = images.double()
    start = LINF.random_start(images, torch.Generator().manual_seed(7))
    point = (images + start).clamp(0, 1).requires_grad_()
    gradient = gradient_of(F.cross_entropy(Adversary(network)(point), labels, reduction="sum"), point)
    delta = (point.detach() - images + 1.25 * LINF.epsilon * gradient.sign()).clamp(-LINF.epsilon, LINF.epsilon)
    expected = F.cross_entropy(same(network).train()((images + delta).clamp(0, 1)), labels)

    objective = ObjectiveConfig("fast").build(AttackConfig(steps=9))
    generator = torch.Generator().manual_seed(7)
    loss, _ = objective.loss(network.train(), Adversary(network), MicroBatch(images, labels, LINF, generator=generator))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("threat_model", [pytest.param(LINF, marks=pytest.mark.slow), L2], ids=str)
def test_free_updates_weights_and_perturbation_with_one_gradient(
    network: NormalizedModel, images: Tensor, labels: Tensor, threat_model: ThreatModel
) -> None:
    """Shafahi et al. 2019, algorithm 1, over two batches of three replays, against the loop written out."""
    rate, batches = 0.05, [(images.double(), labels), (images.double().flip(0), labels.flip(0))]
    reference = NormalizedModel(build_backbone(BackboneSpec("resnet18", 4)), BackboneSpec("resnet18", 4)).double()
    reference.load_state_dict(network.state_dict())
    delta, losses = torch.zeros_like(images.double()), []
    for x, y in batches:
        for _ in range(3):
            delta.requires_grad_()
            loss = F.cross_entropy(reference.train()((x + delta).clamp(0, 1)), y)
            gradients = torch.autograd.grad(loss, [delta, *reference.parameters()])
            with torch.no_grad():
                for parameter, gradient in zip(reference.parameters(), gradients[1:], strict=True):
                    parameter -= rate * gradient
            step = threat_model.epsilon * direction(gradients[0], threat_model)
            delta = project(delta.detach() + step, threat_model)
            losses.append(loss.item())

    objective = ObjectiveConfig("free", replays=3).build(ATTACK)
    assert objective.replays == 3
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    ours = []
    for x, y in batches:
        for _ in range(objective.replays):
            optimizer.zero_grad()
            loss, _ = objective.loss(network.train(), Adversary(network), MicroBatch(x, y, threat_model))
            loss.backward()
            objective.after_backward()
            optimizer.step()
            ours.append(loss.item())
    assert ours == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(objective.state_dict()["0"], delta)


def test_free_keeps_one_perturbation_a_micro_batch_and_carries_them_over(
    network: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    objective, other = (ObjectiveConfig("free").build(ATTACK) for _ in range(2))
    parts = [(images.double(), labels), (images.double().flip(0), labels.flip(0))]
    for part, (x, y) in enumerate(parts):
        loss, _ = objective.loss(network, Adversary(network), MicroBatch(x, y, LINF, part=part))
        loss.backward()
        objective.after_backward()
    state = objective.state_dict()
    assert not torch.equal(state["0"], state["1"])
    torch.testing.assert_close(state["0"], state["1"].flip(0))  # each saw its own images
    other.load_state_dict(state)
    losses = [
        o.loss(network, Adversary(network), MicroBatch(*parts[1], LINF, part=1))[0].item() for o in (objective, other)
    ]
    assert losses[0] == losses[1]


def test_trades_is_clean_loss_plus_weighted_divergence(
    network: NormalizedModel, images: Tensor, labels: Tensor
) -> None:
    """Zhang et al. 2019, eq. 5, the ascent of algorithm 1 with KL written as its sum."""
    images, beta = images.double(), 3.0

    def divergence(target: Tensor, logits: Tensor) -> Tensor:
        return (target * (target.log() - F.log_softmax(logits, 1))).sum(1)

    with torch.no_grad():
        target = F.softmax(Adversary(network)(images), 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    point = (images + 1e-3 * noise).clamp(0, 1)
    for _ in range(ATTACK.steps):
        point = point.detach().requires_grad_()
        gradient = gradient_of(divergence(target, Adversary(network)(point)).sum(), point)
        step = ATTACK.relative_step_size * LINF.epsilon * gradient.sign()
        point = (images + project(point.detach() + step - images, LINF)).clamp(0, 1)
    reference = same(network).train()
    clean, adversarial = reference(images), reference(point.detach())
    expected = F.cross_entropy(clean, labels) + beta * divergence(F.softmax(clean, 1), adversarial).mean()

    objective = ObjectiveConfig("trades", trades_beta=beta).build(ATTACK)
    generator = torch.Generator().manual_seed(3)
    loss, logits = objective.loss(
        network.train(), Adversary(network), MicroBatch(images, labels, LINF, generator=generator)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits, adversarial, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pgd", "fast", "free", "trades"])
def test_epsilon_zero_is_standard_training(network: NormalizedModel, images: Tensor, labels: Tensor, kind: str) -> None:
    images = images.double()
    expected = F.cross_entropy(network.train()(images), labels).item()
    objective = ObjectiveConfig(kind).build(ATTACK)
    loss, _ = objective.loss(network.train(), Adversary(network), MicroBatch(images, labels, ThreatModel("L2", 0)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    objective.after_backward()
    again, _ = objective.loss(network.train(), Adversary(network), MicroBatch(images, labels, ThreatModel("L2", 0)))
    assert again.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_chance() -> None:
    assert ObjectiveConfig().build(ATTACK).chance_loss(10) == pytest.approx(math.log(10))
    assert ObjectiveConfig("trades", trades_beta=6).build(ATTACK).chance_loss(10) == pytest.approx(7 * math.log(10))


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "mart"}, {"replays": 0}, {"trades_beta": -1.0}, {"trades_beta": math.nan}, {"label_smoothing": 1}],
)
def test_what_is_no_objective_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ObjectiveConfig(**wrong)
