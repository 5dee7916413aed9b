"""PGD and APGD against what mathematics says of them, a slow loop from the definition, and APGD's authors' code."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_backbones.attacks import (
    AttackConfig,
    Strongest,
    apgd,
    ascend,
    check_points,
    frozen_eval,
    pgd,
    random_point,
    strongest_points,
)
from robust_backbones.errors import InputError
from robust_backbones.models import NormalizedModel
from robust_backbones.threat_models import ThreatModel
from tests.transfer.conftest import narrow_resnet18  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
THREAT_MODELS = [ThreatModel("L2", 0.5), ThreatModel("Linf", 8 / 255)]
Losses = Callable[[Tensor], Tensor]


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


def test_a_list_of_images_goes_the_way_of_each_alone() -> None:
    """Images of different sizes, one loss of all; every image has its own ball."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((8, 8), (5, 9))]
    weights = [torch.randn(image.shape, generator=generator, dtype=torch.float64) for image in images]

    def loss(points: list[Tensor]) -> Tensor:
        return sum((weight * point**2).sum() for weight, point in zip(weights, points, strict=True))

    for threat_model in THREAT_MODELS:
        attack = AttackConfig(steps=4)
        start = random_point(images, threat_model, torch.Generator().manual_seed(1))
        together = ascend(loss, images, threat_model, attack, start=start)
        for image, weight, first, point in zip(images, weights, start, together, strict=True):
            alone = ascend(
                lambda x, weight=weight: (weight * x**2).flatten(1).sum(1),
                image[None],
                threat_model,
                attack,
                start=first[None],
            )
            torch.testing.assert_close(point, alone[0], rtol=0, atol=1e-14)
            check_points(point[None], image[None], threat_model)


def test_text_and_defaults_are_the_papers(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    expected = pgd(small_model, images, labels, ThreatModel("Linf", 4 / 255), AttackConfig(3, 2 / 3))
    assert torch.equal(pgd(small_model, images, labels, "Linf:4/255"), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 255 * x, "0-255"),
        (lambda x: (255 * x).byte(), "floats"),
        (lambda x: (x - 0.45) / 0.225, "normalised"),
        (lambda x: 1.02 * x, "overshoot"),
        (lambda x: x * float("nan"), "in \\[0, 1\\]"),
        (lambda x: x[0], "shape"),
    ],
)
def test_images_outside_the_unit_range_are_refused(
    small_model: NormalizedModel, images: Tensor, labels: Tensor, change: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        pgd(small_model, change(images), labels, "L2:0.5")


def test_a_ball_that_holds_every_image_is_refused(small_model: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    """The diameter of [0, 1]^d is sqrt(d): 55.4 for 3 x 32 x 32."""
    with pytest.raises(InputError, match="L2:128/255"):
        pgd(small_model, images, labels, "L2:128")
    pgd(small_model, images, labels, "L2:55", AttackConfig(steps=1))


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


@pytest.fixture
def small_images(images: Tensor) -> Tensor:
    """In float64, where rounding does not decide the sign of near-zero gradients; shape (2, 3, 16, 16)."""
    return images[:2, :, ::2, ::2].double()


@pytest.fixture
def losses(small_model: NormalizedModel, labels: Tensor) -> Losses:
    """The cross-entropy of a network in float64 on two images."""
    model = small_model.double().eval().requires_grad_(False)
    return lambda points: F.cross_entropy(model(points), labels[:2], reduction="none")


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_a_run_shows_every_point_and_goes_the_same_way(
    losses: Losses, small_images: Tensor, threat_model: ThreatModel
) -> None:
    images, attack = small_images, AttackConfig(steps=4)
    start = random_point(images, threat_model, torch.Generator().manual_seed(0))
    points, values = [], []
    end = ascend(
        losses, images, threat_model, attack, start=start, visit=lambda x, v: points.append(x) or values.append(v)
    )
    assert torch.equal(end, ascend(losses, images, threat_model, attack, start=start))
    assert len(points) == attack.steps + 1
    assert torch.equal(points[0], start)
    assert torch.equal(points[-1], end)
    for steps, point in enumerate(points[1:], start=1):
        assert torch.equal(point, ascend(losses, images, threat_model, AttackConfig(steps=steps), start=start))
    for point, value in zip(points, values, strict=True):
        torch.testing.assert_close(value, losses(point), rtol=1e-12, atol=0)


def test_the_strongest_is_the_maximum_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(6, 5, 3, 2, 2, generator=generator)
    losses = torch.randint(4, (6, 5), generator=generator).float()  # with ties
    strongest = Strongest()
    for point, loss in zip(points, losses, strict=True):
        strongest.show(point, loss)
    for image in range(5):
        first = losses[:, image].tolist().index(losses[:, image].max())
        assert torch.equal(strongest.points[image], points[first, image])
        assert strongest.losses[image] == losses[first, image]
    assert torch.equal(strongest.first_losses, losses[0])


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("restarts", [1, 2])
def test_more_steps_are_never_weaker(
    losses: Losses, small_images: Tensor, threat_model: ThreatModel, restarts: int
) -> None:
    """Exactly, and the loss told is that of the point; each step takes one forward pass, each run one more."""
    calls = []

    def counted(points: Tensor) -> Tensor:
        calls.append(points)
        return losses(points)

    images, before, random_start = small_images, None, restarts > 1
    for steps in range(1, 7):
        calls.clear()
        # Steps of the ball's diameter: the last point is often not the best one.
        attack = AttackConfig(steps=steps, relative_step_size=2, random_start=random_start, restarts=restarts)
        generator = torch.Generator().manual_seed(0)
        best = strongest_points(counted, images, threat_model, attack, generator=generator)
        check_points(best.points, images, threat_model)
        assert len(calls) == restarts * (steps + 1) + random_start
        torch.testing.assert_close(best.losses, losses(best.points), rtol=1e-12, atol=0)
        torch.testing.assert_close(best.first_losses, losses(images), rtol=1e-12, atol=0)
        assert (best.losses >= (best.first_losses if before is None else before)).all()
        before = best.losses


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("steps", [1, 15])
def test_apgd_is_its_authors(
    small_model: NormalizedModel,
    losses: Losses,
    small_images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    steps: int,
) -> None:
    """From the same start to the same points.

    The tolerance is for their norms, to which they add 1e-12, and for losses and step sizes, which they keep in
    float32.
    """
    library = pytest.importorskip("pyautoattack.autopgd_base")
    images, labels = small_images, labels[:2]
    start = random_point(images, threat_model, torch.Generator().manual_seed(0))
    theirs = library.APGDAttack(
        lambda points: small_model(points), n_iter=steps, norm=threat_model.norm, eps=threat_model.epsilon, device="cpu"
    )
    theirs.init_hyperparam(images)
    points, _, their_losses, _ = theirs.attack_single_run(images, labels, x_init=start)
    ours = apgd(losses, images, threat_model, steps, start=start)
    torch.testing.assert_close(ours.losses, their_losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.points, points, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_apgd_is_its_authors_whatever_the_loss_does(threat_model: ThreatModel, steps: int, seed: int) -> None:
    """Losses and gradients are drawn, most steps going up a little and some down a lot: every checkpoint is met.

    All first steps go up: the authors' code counts them as such, the paper counts those that do.
    """
    library = pytest.importorskip("pyautoattack.autopgd_base")
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    gradients = torch.randn(steps + 1, 3, 4, generator=generator, dtype=torch.float64)
    noise = torch.randint(1024, (2, steps + 1, 3), generator=generator).double() / 1024  # so that float32 holds losses
    heights = 99 + torch.where(noise[0] < [0.7, 0.85, 1][seed % 3], noise[1], -3 * noise[1]).cumsum(0)
    heights[0] = heights[1] - 0.125

    def script() -> Losses:
        visited = iter(zip(heights, gradients, strict=True))

        def losses(flat: Tensor) -> Tensor:
            height, gradient = next(visited)
            return height + (gradient * (flat - flat.detach())).sum(1)

        return losses

    theirs = library.APGDAttack(
        lambda points: points.flatten(1),
        n_iter=steps,
        norm=threat_model.norm,
        eps=threat_model.epsilon,
        loss="dlr",
        device="cpu",
    )
    scripted, ours = script(), script()
    theirs.dlr_loss = lambda logits, _: scripted(logits)
    theirs.init_hyperparam(images)
    expected, _, _, _ = theirs.attack_single_run(images, torch.zeros(3, dtype=torch.long), x_init=images)
    best = apgd(lambda points: ours(points.flatten(1)), images, threat_model, steps, start=images)
    assert torch.equal(best.losses, heights.amax(0))
    torch.testing.assert_close(best.points, expected, rtol=0, atol=1e-7)  # their step sizes are float32


def test_apgd_halves_its_steps_where_the_loss_stalls() -> None:
    """On the concave loss -(x - 1/2)^2 of one pixel, a fixed step leaps over the maximum, again and again."""
    images, threat_model = torch.tensor([0.47, 0.1])[:, None, None, None], ThreatModel("Linf", 0.1)

    def losses(points: Tensor) -> Tensor:
        return -(((points - 0.5) ** 2).flatten(1).sum(1))

    best = apgd(losses, images, threat_model, 60, start=images)
    # The second maximum is out of reach: its image ends at the border of the ball.
    torch.testing.assert_close(best.points.flatten(), torch.tensor([0.5, 0.2]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_points_outside_are_found(images: Tensor, threat_model: ThreatModel) -> None:
    inside = random_point(images, threat_model, torch.Generator().manual_seed(0))
    check_points(inside, images, threat_model)
    towards_grey = (0.5 - images).sign() * torch.eye(4)[0][:, None, None, None]  # of the first image alone
    pixels = images[0].numel()
    too_far = 1.001 * threat_model.epsilon * (1 if threat_model.norm == "Linf" else pixels**-0.5)
    for wrong in (images + too_far * towards_grey, inside - 1e-3 * (inside == 0), inside + 1e-3 * (inside == 1)):
        with pytest.raises(RuntimeError, match="outside"):
            check_points(wrong, images, threat_model)
