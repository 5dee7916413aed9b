"""Projected gradient descent: the one attack loop that training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel

# Directions do not depend on the loss's scale, and a power of two changes no digit in float32; in float16 it keeps
# small gradients from vanishing.
_GRADIENT_SCALE = 2.0**8


@dataclass(frozen=True)
class AttackConfig:
    """How hard the adversary tries. The defaults are those of robust training in Salman et al. 2020."""

    steps: int = 3
    relative_step_size: float = 2 / 3
    """Step size as a fraction of epsilon, so that a sweep over epsilon leaves no stale step."""
    random_start: bool = False
    restarts: int = 1
    """Keep the strongest of this many runs for each image; more than one needs a random start."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError(f"an attack needs steps and restarts >= 1, got {self.steps} and {self.restarts}")
        if self.relative_step_size <= 0:
            raise InputError(f"an attack's relative step size must be > 0, got {self.relative_step_size:g}")
        if self.restarts > 1 and not self.random_start:
            raise InputError("several restarts without a random start would be the same run: set random_start")


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    attack: AttackConfig,
    *,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near ``images`` that maximise the model's cross-entropy (Madry et al. 2018, eq. 2.1 and section 2.1).

    The model runs in eval mode with frozen parameters and is given back as it was, exceptions included.

    Args:
        model: maps images in [0, 1] of shape (N, 3, H, W) to logits of shape (N, classes).
        images: shape (N, 3, H, W), float32 in [0, 1].
        labels: shape (N,), class indices.
        threat_model: the ball around each image; epsilon 0 returns ``images``.
        label_smoothing: that of the training loss, when it has one.
        generator: draws the random starts; on the device of ``images``.

    Returns:
        Detached images in [0, 1], each within ``threat_model`` of its original.
    """
    if threat_model.epsilon == 0:
        return images

    def losses(points: Tensor) -> Tensor:
        return F.cross_entropy(model(points).float(), labels, reduction="none", label_smoothing=label_smoothing)

    def run() -> Tensor:
        start = threat_model.random_start(images, generator) if attack.random_start else None
        return ascend(losses, images, threat_model, attack, start=start)

    with frozen_eval(model):
        adversarial = run()
        if attack.restarts == 1:
            return adversarial
        with torch.no_grad():
            loss = losses(adversarial)
        for _ in range(attack.restarts - 1):
            candidate = run()
            with torch.no_grad():
                candidate_loss = losses(candidate)
            stronger = candidate_loss > loss
            adversarial = torch.where(stronger[:, None, None, None], candidate, adversarial)
            loss = torch.maximum(loss, candidate_loss)
        return adversarial


def ascend(
    losses: Callable[[Tensor], Tensor],
    images: Tensor,
    threat_model: ThreatModel,
    attack: AttackConfig,
    *,
    start: Tensor | None = None,
) -> Tensor:
    """One run of projected gradient ascent: start, then step, project, clip; ``attack`` gives steps and step size.

    Args:
        losses: maps points of the shape of ``images`` to one loss an image, shape (N,).
        start: the perturbation to start from; none is the images themselves.

    Returns:
        Detached images in [0, 1], each within ``threat_model`` of its original.
    """
    step_size = attack.relative_step_size * threat_model.epsilon
    adversarial = images.detach() if start is None else (images + start).clamp(0, 1)
    for _ in range(attack.steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            loss = _GRADIENT_SCALE * losses(adversarial).sum()
        (gradient,) = torch.autograd.grad(loss, adversarial)
        step = step_size * threat_model.ascent_direction(gradient)
        delta = threat_model.project(adversarial.detach() + step - images)
        # Clipping moves every pixel towards the original, which lies in [0, 1]: the point stays in the ball.
        adversarial = (images + delta).clamp(0, 1)
    return adversarial


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode with gradients to its parameters off, and give each module back its own mode.

    An attack that ran in train mode would update batch-norm statistics with adversarial images once a step.
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
