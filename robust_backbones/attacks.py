"""Projected gradient ascent, plain and with APGD's schedule, for attacks on classifiers and detectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.errors import InputError, check_positive
from robust_backbones.threat_models import ThreatModel

# Directions do not depend on the loss's scale, and a power of two changes no digit in float32; in float16 it keeps
# small gradients from vanishing.
_GRADIENT_SCALE = 2.0**8

Losses = Callable[[Tensor], Tensor]
"""Points of shape (N, C, H, W) -> one loss per image, shape (N,)."""
Images = TypeVar("Images", Tensor, list[Tensor])
"""Shape (N, C, H, W), or a list of images of shape (C, H, W) whose sizes differ; float32 in [0, 1]."""


@dataclass(frozen=True)
class AttackConfig:
    """The effort of the adversary. The defaults are those of robust training in Salman et al. 2020."""

    steps: int = 3
    relative_step_size: float = 2 / 3
    """Step size as a fraction of epsilon, so that it stays right in a sweep over epsilon."""
    random_start: bool = False
    restarts: int = 1
    """Keep the strongest of this many runs for each image; more than one needs a random start."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "restarts", "relative_step_size")
        if self.restarts > 1 and not self.random_start:
            raise InputError("several restarts without a random start would be the same run: set random_start")


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel | str,
    attack: AttackConfig = AttackConfig(),
    *,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Tensor:
    """Images near ``images`` that maximise the model's cross-entropy (Madry et al. 2018, eq. 2.1 and section 2.1).

    The model runs in eval mode with frozen parameters; its state is restored afterwards, even after an exception.

    Args:
        model: maps images in [0, 1] of shape (N, C, H, W) to logits of shape (N, classes).
        images: shape (N, C, H, W), float32 in [0, 1].
        labels: shape (N,), class indices; or (N, classes), class probabilities.
        threat_model: the ball around each image, such as ``"Linf:4/255"``; epsilon 0 returns ``images``.
        attack: steps and step size; the default is that of robust training in Salman et al. 2020.
        label_smoothing: that of the training loss, if it has any.
        generator: draws the random starts; on the device of ``images``.
        check: check the range of ``images``; on a GPU this waits for the device.

    Returns:
        Detached images in [0, 1], each within ``threat_model`` of its original.

    Raises:
        InputError: images outside [0, 1], or a ball that contains every image.
    """
    threat_model = ThreatModel.parse(threat_model)
    if check:
        check_images(images, threat_model)
    if threat_model.epsilon == 0:
        return images

    def losses(points: Tensor) -> Tensor:
        return F.cross_entropy(model(points).float(), labels, reduction="none", label_smoothing=label_smoothing)

    best = Strongest()
    with frozen_eval(model):
        for _ in range(attack.restarts):
            start = random_point(images, threat_model, generator) if attack.random_start else images
            points = ascend(losses, images, threat_model, attack, start=start)
            if attack.restarts == 1:
                return points
            best.show(points, loss_values(losses, points))
    return best.points


def check_images(images: Tensor, threat_model: ThreatModel) -> None:
    """Refuse images outside [0, 1] and implausible radii, and say what was probably meant."""
    if images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise InputError(f"images must be floats in [0, 1] of shape (N, C, H, W), got {images.dtype} of {images.shape}")
    low, high = torch.stack(images.aminmax()).tolist()
    if not (low >= 0 and high <= 1):
        if low >= 0 and high > 2:
            likely = "are they in 0-255? Divide them by 255"
        elif low < -0.2 or high > 1.2:
            likely = "are they normalised? Give the model with its mean and std inside, as NormalizedModel has them"
        else:
            likely = "did resizing overshoot? Clamp them to [0, 1]"
        raise InputError(f"images must lie in [0, 1], these lie in [{low:g}, {high:g}]: {likely}")
    threat_model.check_radius(images.shape[1:])


def ascend(
    losses: Callable[[Images], Tensor],
    images: Images,
    threat_model: ThreatModel,
    attack: AttackConfig,
    *,
    start: Images,
    visit: Callable[[Images, Tensor], object] | None = None,
) -> Images:
    """One run of projected gradient ascent; ``attack`` gives steps and step size.

    Args:
        losses: maps points like ``images`` to one loss per image, shape (N,), or one for all, shape ().
        start: the points to start from.
        visit: called with every point of the run, including start and end, and its losses. Those of the end take one
            more forward pass.

    Returns:
        Detached images in [0, 1], each within ``threat_model`` of its original.
    """
    points, length = start, attack.relative_step_size * threat_model.epsilon
    for _ in range(attack.steps):
        values, gradient = _values_and_gradient(losses, points)
        if visit is not None:
            visit(points, values)
        points = step(points, gradient, images, threat_model, length)
    if visit is not None:
        visit(points, loss_values(losses, points))
    return points


def step(points: Images, gradient: Images, images: Images, threat_model: ThreatModel, length: float | Tensor) -> Images:
    """A step up the gradient, projected back into the ball around ``images``, and clipped to [0, 1]."""
    if isinstance(points, list):
        return [step(p, g, x, threat_model, length) for p, g, x in zip(points, gradient, images, strict=True)]
    with torch.no_grad():
        return _nearest(points + length * threat_model.ascent_direction(gradient), images, threat_model)


def _nearest(points: Tensor, images: Tensor, threat_model: ThreatModel) -> Tensor:
    """Clipping moves every pixel towards the original, which lies in [0, 1]: the point stays in the ball."""
    return (images + threat_model.project(points - images)).clamp(0, 1)


def _values_and_gradient(losses: Callable[[Images], Tensor], points: Images) -> tuple[Tensor, Images]:
    """The losses, and the scaled gradient of their sum."""
    points = leaves(points)
    with torch.enable_grad():
        values = losses(points)
        gradients = torch.autograd.grad(_GRADIENT_SCALE * values.sum(), points)
    return values.detach(), list(gradients) if isinstance(points, list) else gradients[0]


def leaves(points: Images) -> Images:
    """The same points, detached, as leaves that require a gradient."""
    if isinstance(points, list):
        return [leaves(point) for point in points]
    return points.detach().requires_grad_()


def random_point(images: Images, threat_model: ThreatModel, generator: torch.Generator | None = None) -> Images:
    """Drawn uniformly from the ball around each image, then clipped to [0, 1]."""
    if isinstance(images, list):
        return [random_point(image, threat_model, generator) for image in images]
    return (images + threat_model.random_start(images, generator)).clamp(0, 1)


class Strongest:
    """Keeps, image by image, the point with the highest loss of those shown to it; of equals, the first."""

    points: Tensor
    """Shape (N, C, H, W)."""
    losses: Tensor
    """Their losses, shape (N,)."""
    first_losses: Tensor
    """The losses of the points shown first."""
    shown = 0
    """How many points of each image it has seen."""

    def show(self, points: Tensor, losses: Tensor) -> Tensor:
        """Show points to it. Returns which images now have another point, bool of shape (N,)."""
        self.shown += 1
        if self.shown == 1:
            self.points, self.losses, self.first_losses = points, losses, losses
            return torch.ones_like(losses, dtype=torch.bool)
        stronger = losses > self.losses
        self.points = torch.where(_column(stronger), points, self.points)
        self.losses = torch.where(stronger, losses, self.losses)
        return stronger


def apgd(losses: Losses, images: Tensor, threat_model: ThreatModel, steps: int, *, start: Tensor) -> Strongest:
    """One run of Auto-PGD: the step size of each image halves where its loss stalls (Croce & Hein 2020, algorithm 1).

    Steps have momentum and are 2 epsilon long at first. At checkpoints, at decreasing intervals, an image returns to
    its best point with half the step size if at most 3 of 4 steps raised its loss, or if its best loss has not risen
    since a checkpoint that did not change the step size. Where the paper and its authors' code differ (the paper has
    fewer than 3 of 4), this follows the code.

    Returns:
        The strongest points of the run, ``start`` included. The schedule depends on ``steps``: unlike that of
        ``ascend`` with its fixed step size, the best loss of a longer run may be lower.
    """
    points = former = start
    best, best_gradient = Strongest(), torch.zeros_like(points)
    step_sizes = images.new_full((len(images),), 2 * threat_model.epsilon)
    former_values = torch.full_like(step_sizes, math.inf)
    # Since the last checkpoint: how often the loss rose, how high it was, and whether the step size was halved there.
    rises, best_losses = torch.zeros_like(step_sizes), torch.zeros_like(step_sizes)
    halved = torch.ones_like(step_sizes, dtype=torch.bool)
    checkpoint = interval = max(int(0.22 * steps), 1)
    for number in range(steps):
        values, gradient = _values_and_gradient(losses, points)
        best_gradient = torch.where(_column(best.show(points, values)), gradient, best_gradient)
        rises = rises + (values > former_values)
        former_values = values
        if number == checkpoint:
            stalled = (rises <= 0.75 * interval) | (~halved & (best.losses <= best_losses))
            step_sizes = torch.where(stalled, step_sizes / 2, step_sizes)
            points = torch.where(_column(stalled), best.points, points)
            gradient = torch.where(_column(stalled), best_gradient, gradient)
            rises, best_losses, halved = torch.zeros_like(rises), best.losses, stalled
            interval = max(interval - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            checkpoint += interval
        ahead = step(points, gradient, images, threat_model, _column(step_sizes))
        momentum = 0.25 * (points - former) if number > 0 else 0.25 * (ahead - points)
        former, points = points, _nearest(points + 0.75 * (ahead - points) + momentum, images, threat_model)
    best.show(points, loss_values(losses, points))
    return best


def strongest_points(
    losses: Losses,
    images: Tensor,
    threat_model: ThreatModel,
    attack: AttackConfig,
    *,
    schedule: Literal["fixed", "apgd"] = "fixed",
    generator: torch.Generator | None = None,
) -> Strongest:
    """The points with the highest loss found by all restarts of an attack, including the images themselves.

    With the fixed schedule, a longer attack visits the same points and more, so its loss is never lower, not even in
    the last digit, if ``losses`` is deterministic.

    Args:
        images: shape (N, C, H, W), float32 in [0, 1].
        attack: its effort; ``apgd`` ignores the step size.
        schedule: of the step sizes, as in ``ascend`` or ``apgd``.
        generator: draws the random starts; on the device of ``images``.

    Returns:
        Points in the threat model and their losses; ``first_losses`` are those of ``images``.
    """

    def run(start: Tensor) -> Strongest:
        if schedule == "apgd":
            return apgd(losses, images, threat_model, attack.steps, start=start)
        best = Strongest()
        ascend(losses, images, threat_model, attack, start=start, visit=best.show)
        return best

    if not attack.random_start:
        return run(images)
    best = Strongest()
    best.show(images, loss_values(losses, images))
    for _ in range(attack.restarts):
        end = run(random_point(images, threat_model, generator))
        best.show(end.points, end.losses)
    return best


def loss_values(losses: Callable[[Images], Tensor], points: Images) -> Tensor:
    """The losses as a step computes them, with a graph: without one, some layers (FrozenBN) round differently."""
    with torch.enable_grad():
        return losses(leaves(points)).detach()


def check_points(adversarial: Tensor, images: Tensor, threat_model: ThreatModel) -> None:
    """Check an attack's result: raise ``RuntimeError`` unless every point lies in the ball and in [0, 1].

    The tolerance is 1e-5 of epsilon, for sums over many pixels, and a float32's rounding near 1 in every value.
    """
    rounding = threat_model.size(torch.full_like(images, torch.finfo(torch.float32).eps))
    inside = threat_model.size(adversarial - images) <= threat_model.epsilon * (1 + 1e-5) + rounding
    if not (inside.all() and adversarial.min() >= 0 and adversarial.max() <= 1):
        raise RuntimeError(f"an attack returned images outside {threat_model} or [0, 1]: its result cannot be used")


def _column(values: Tensor) -> Tensor:
    """Shape (N,) -> (N, 1, 1, 1)."""
    return values[:, None, None, None]


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without parameter gradients, and restore the mode of each module afterwards.

    In train mode, an attack would update batch norm statistics with adversarial images at every step.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
