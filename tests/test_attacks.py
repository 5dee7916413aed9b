"""PGD against what mathematics says of it, and against a slow loop written from the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, frozen_eval, pgd
from robust_backbones.errors import InputError
from robust_backbones.models import NormalizedModel
from robust_backbones.threat_models import ThreatModel

THREAT_MODELS = [ThreatModel("L2", 0.5), ThreatModel("Linf", 8 / 255)]


class Linear(nn.Module):
    """Two logits, 0 and <w, x>: the loss of class 0 grows along w everywhere."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("random_start", [False, True])
def test_linear_model_linf_reaches_the_corner(weight: Tensor, random_start: bool) -> None:
    """The optimum over the linf ball is ε sign(w), wherever [0, 1] does not cut it off."""
    images, epsilon = torch.full((2, 3, 8, 8), 0.5), 0.1
    attack = AttackConfig(steps=6, relative_step_size=0.5, random_start=random_start)
    adversarial = pgd(Linear(weight), images, torch.zeros(2, dtype=torch.long), ThreatModel("Linf", epsilon), attack)
    torch.testing.assert_close(adversarial - images, epsilon * weight.sign().expand(2, -1, -1, -1))


def test_linear_model_l2_reaches_the_pole(weight: Tensor) -> None:
    """The optimum over the l2 ball is ε w / ‖w‖."""
    images, epsilon = torch.full((2, 3, 8, 8), 0.5), 0.3
    labels = torch.zeros(2, dtype=torch.long)
    adversarial = pgd(Linear(weight), images, labels, ThreatModel("L2", epsilon), AttackConfig())
    torch.testing.assert_close(adversarial - images, (epsilon * weight / weight.norm()).expand(2, -1, -1, -1))


def test_linear_model_at_the_border_of_the_image(weight: Tensor) -> None:
    """Pixels at 0 and 1 move only inwards: the optimum is clip(x + ε sign(w))."""
    images = (weight > 0).float()[None]
    labels = torch.zeros(1, dtype=torch.long)
    adversarial = pgd(Linear(weight), images, labels, ThreatModel("Linf", 0.1), AttackConfig(steps=5))
    torch.testing.assert_close(adversarial, images)


def slow_pgd(model: nn.Module, image: Tensor, label: int, threat_model: ThreatModel, attack: AttackConfig) -> Tensor:
    """One image at a time, perturbation kept as such, norms written out."""
    delta = torch.zeros_like(image)
    step_size = attack.relative_step_size * threat_model.epsilon
    for _ in range(attack.steps):
        point = (image + delta).requires_grad_()
        (-F.log_softmax(model(point[None]), dim=1)[0, label]).backward()
        gradient = point.grad
        if threat_model.norm == "L2":
            delta = delta + step_size * gradient / (gradient**2).sum().sqrt()
            length = (delta**2).sum().sqrt()
            delta = delta * min(1, threat_model.epsilon / length)
        else:
            delta = delta + step_size * torch.sign(gradient)
            delta = torch.minimum(
                torch.maximum(delta, torch.tensor(-threat_model.epsilon)), torch.tensor(threat_model.epsilon)
            )
        delta = (image + delta).clamp(0, 1) - image
    return image + delta


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_equals_the_slow_loop(
    small_model: NormalizedModel, images: Tensor, labels: Tensor, threat_model: ThreatModel
) -> None:
    model = small_model.double().eval()  # in float32, rounding decides the sign of near-zero gradients
    attack = AttackConfig(steps=4)
    images = images.double()
    fast = pgd(model, images, labels, threat_model, attack)
    slow = torch.stack([slow_pgd(model, x, int(y), threat_model, attack) for x, y in zip(images, labels, strict=True)])
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-7)  # pgd takes its loss in float32, always


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("random_start", [False, True])
def test_stays_in_the_ball_and_in_the_image(
    small_model: NormalizedModel, images: Tensor, labels: Tensor, threat_model: ThreatModel, random_start: bool
) -> None:
    attack = AttackConfig(steps=3, random_start=random_start)
    adversarial = pgd(small_model, images, labels, threat_model, attack)
    assert (threat_model.size(adversarial - images) <= threat_model.epsilon * (1 + 1e-5)).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad


def test_epsilon_zero_is_the_identity(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    assert pgd(small_model, images, labels, ThreatModel("L2", 0), AttackConfig()) is images


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_raises_the_loss(
    small_model: NormalizedModel, images: Tensor, labels: Tensor, threat_model: ThreatModel
) -> None:
    model = small_model.eval()
    adversarial = pgd(model, images, labels, threat_model, AttackConfig(steps=5))
    with torch.no_grad():
        assert F.cross_entropy(model(adversarial), labels) > F.cross_entropy(model(images), labels) + 0.01


def test_restarts_keep_the_strongest(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """With the same generator, the first of three runs is the single run: no image may come out weaker."""
    model, threat_model = small_model.eval(), ThreatModel("Linf", 8 / 255)

    def losses(restarts: int) -> Tensor:
        attack = AttackConfig(steps=1, random_start=True, restarts=restarts)
        generator = torch.Generator().manual_seed(0)
        adversarial = pgd(model, images, labels, threat_model, attack, generator=generator)
        with torch.no_grad():
            return F.cross_entropy(model(adversarial), labels, reduction="none")

    one, three = losses(1), losses(3)
    assert (three >= one - 1e-5).all()
    assert (three > one + 1e-4).any()


def test_the_model_comes_back_as_it_was(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    small_model.backbone.bn1.eval()  # a mix of modes, as fine-tuning with frozen statistics has it
    small_model.backbone.conv1.weight.requires_grad_(False)
    modes = [module.training for module in small_model.modules()]
    trainable = [parameter.requires_grad for parameter in small_model.parameters()]
    state = {name: tensor.clone() for name, tensor in small_model.state_dict().items()}

    pgd(small_model, images, labels, ThreatModel("L2", 1), AttackConfig())
    with pytest.raises(RuntimeError, match="halfway"), frozen_eval(small_model):
        assert not any(module.training for module in small_model.modules())
        raise RuntimeError("halfway")

    assert [module.training for module in small_model.modules()] == modes
    assert [parameter.requires_grad for parameter in small_model.parameters()] == trainable
    assert all(torch.equal(tensor, state[name]) for name, tensor in small_model.state_dict().items())
    assert all(parameter.grad is None for parameter in small_model.parameters())


def test_works_without_gradients_around_it(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        assert not torch.equal(pgd(small_model, images, labels, ThreatModel("L2", 1), AttackConfig()), images)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"relative_step_size": 0.0}, {"restarts": 2, "random_start": False}]
)
def test_what_is_no_attack_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        AttackConfig(**wrong)
