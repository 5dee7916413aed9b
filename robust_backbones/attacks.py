"""Projected gradient descent: the one attack loop that training and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near ``images`` that maximise the model's cross-entropy (Madry et al. 2018, eq. 2.1 and section 2.1).

    The model runs in eval mode with frozen parameters and is given back as it was, exceptions included.

    Args:
        model: maps images in [0, 1] of shape (N, 3, H, W) to logits of shape (N, classes).
        images: shape (N, 3, H, W), float32 in [0, 1].
        labels: shape (N,), class indices.
        threat_model: the ball around each image; epsilon 0 returns ``images``.
        generator: draws the random starts; on the device of ``images``.

    Returns:
        Detached images in [0, 1], each within ``threat_model`` of its original.
    """
    if threat_model.epsilon == 0:
        return images
    with frozen_eval(model):
        adversarial = _ascend(model, images, labels, threat_model, attack, generator)
        if attack.restarts == 1:
            return adversarial
        loss = _losses(model, adversarial, labels)
        for _ in range(attack.restarts - 1):
            candidate = _ascend(model, images, labels, threat_model, attack, generator)
            candidate_loss = _losses(model, candidate, labels)
            stronger = candidate_loss > loss
            adversarial = torch.where(stronger[:, None, None, None], candidate, adversarial)
            loss = torch.maximum(loss, candidate_loss)
        return adversarial


def _ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    attack: AttackConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """One run of PGD: start, then step, project, clip."""
    step_size = attack.relative_step_size * threat_model.epsilon
    adversarial = images.detach()
    if attack.random_start:
        adversarial = (images + threat_model.random_start(images, generator)).clamp(0, 1)
    for _ in range(attack.steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(adversarial).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        step = step_size * threat_model.ascent_direction(gradient)
        delta = threat_model.project(adversarial.detach() + step - images)
        # Clipping moves every pixel towards the original, which lies in [0, 1]: the point stays in the ball.
        adversarial = (images + delta).clamp(0, 1)
    return adversarial


@torch.no_grad()
def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, shape (N,)."""
    return F.cross_entropy(model(images).float(), labels, reduction="none")


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
