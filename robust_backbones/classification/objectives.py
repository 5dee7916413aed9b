"""What robust training minimises: PGD, free, fast and TRADES, behind one interface.

Every objective is a function of the images, the labels and the ball around each image. It gets the network twice:
``model`` for training (train mode, with gradients to its weights) and ``adversary`` for attacks (eval mode).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, ascend, frozen_eval, pgd
from robust_backbones.errors import InputError, check_choice, check_not_negative, check_positive
from robust_backbones.threat_models import ThreatModel

Network = Callable[[Tensor], Tensor]
"""Images in [0, 1] of shape (N, 3, H, W) -> float32 logits (N, classes)."""


@dataclass(frozen=True)
class MicroBatch:
    """The images that go through the network at once, and the ball around each of them."""

    images: Tensor
    """Shape (N, 3, H, W), float32 in [0, 1]."""
    labels: Tensor
    """Shape (N,), class indices; or (N, classes), class probabilities of mixed images."""
    threat_model: ThreatModel
    part: int = 0
    """The micro-batch's index within its optimiser step."""
    generator: torch.Generator | None = None
    """Draws the random numbers of the attack."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objective, and its own parameters; the defaults are the paper's plain PGD training."""

    kind: str = "pgd"
    """pgd: PGD adversarial training with ``attack`` (Madry et al. 2018).
    trades: clean loss plus ``trades_beta`` times the divergence under ``attack`` (Zhang et al. 2019).
    fast: one step of 1.25 epsilon from a random start (Wong et al. 2020), without ``attack``.
    free: each batch is replayed, and each backward pass updates weights and perturbation (Shafahi et al. 2019)."""
    replays: int = 4
    """m of free training: replays of each batch. Train for 1/m of the epochs to spend the same time."""
    trades_beta: float = 6.0
    """1/lambda of TRADES: the weight of the robust term."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (Szegedy et al. 2016)."""

    def __post_init__(self) -> None:
        check_choice("objective", self.kind, OBJECTIVES)
        check_positive(self, "replays")
        check_not_negative(self, "trades_beta")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is a share in [0, 1), got {self.label_smoothing:g}")

    def build(self, attack: AttackConfig) -> Objective:
        return OBJECTIVES[self.kind](self, attack)


@dataclass
class Objective:
    """PGD adversarial training: the loss on the worst images that PGD finds (Madry et al. 2018, eq. 2.1)."""

    config: ObjectiveConfig
    attack: AttackConfig
    replays: int = field(default=1, init=False)
    """Optimiser steps on each batch."""
    has_state: ClassVar[bool] = False
    """Whether a loss depends on the previous one."""

    def loss(self, model: Network, adversary: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The mean loss over a micro-batch, a scalar in nats, and the logits (N, classes) on the perturbed images."""
        adversarial = pgd(
            adversary,
            batch.images,
            batch.labels,
            batch.threat_model,
            self.attack,
            label_smoothing=self.config.label_smoothing,
            generator=batch.generator,
            check=False,
        )
        logits = model(adversarial)
        return self.cross_entropy(logits, batch.labels), logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def after_backward(self) -> None:
        """Called once the gradients of the last loss are available."""

    def chance_loss(self, classes: int) -> float:
        """The loss in nats of a uniform prediction; a run far above it has diverged."""
        return math.log(classes)

    def state_dict(self) -> dict[str, Any]:
        """What the next batch needs from the last one, in this process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""


class Fast(Objective):
    """PGD with one step of 1.25 epsilon from a random start in the ball (Wong et al. 2020, algorithm 3)."""

    def __init__(self, config: ObjectiveConfig, attack: AttackConfig) -> None:
        super().__init__(config, AttackConfig(steps=1, relative_step_size=1.25, random_start=True))


class Free(Objective):
    """Replay each batch m times; each gradient updates weights and perturbation at once (Shafahi et al. 2019, alg. 1).

    The perturbation of one batch is the start of the next one's. One is kept for each micro-batch of a step.
    """

    has_state: ClassVar[bool] = True

    def __init__(self, config: ObjectiveConfig, attack: AttackConfig) -> None:
        super().__init__(config, attack)
        self.replays = config.replays
        self._deltas: dict[int, Tensor] = {}
        self._last: tuple[MicroBatch, Tensor] | None = None

    def loss(self, model: Network, adversary: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        delta = self._deltas.get(batch.part)
        if delta is None or delta.shape != batch.images.shape:
            delta = torch.zeros_like(batch.images)
        delta = delta.to(batch.images.device).requires_grad_()
        self._last = (batch, delta)
        logits = model((batch.images + delta).clamp(0, 1))
        return self.cross_entropy(logits, batch.labels), logits

    def after_backward(self) -> None:
        assert self._last is not None
        batch, delta = self._last
        assert delta.grad is not None
        step = batch.threat_model.epsilon * batch.threat_model.ascent_direction(delta.grad)
        self._deltas[batch.part] = batch.threat_model.project(delta.detach() + step)

    def state_dict(self) -> dict[str, Any]:
        return {str(part): delta.cpu() for part, delta in self._deltas.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._deltas = {int(part): delta for part, delta in state.items()}


class Trades(Objective):
    """CE(f(x), y) + beta KL(f(x) ‖ f(x')), with x' the image in the ball that maximises the KL (Zhang et al. 2019).

    Equation 5 and algorithm 1: the ascent starts at the image plus Gaussian noise of 0.001 (at the image itself the
    divergence has no gradient). ``loss`` returns the logits at x'.
    """

    def loss(self, model: Network, adversary: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        images, adversarial, threat_model = batch.images, batch.images, batch.threat_model
        if threat_model.epsilon > 0:
            with frozen_eval(adversary):
                with torch.no_grad():
                    target = F.softmax(adversary(images), dim=1)

                def divergence(points: Tensor) -> Tensor:
                    return F.kl_div(F.log_softmax(adversary(points), dim=1), target, reduction="none").sum(1)

                noise = 1e-3 * torch.randn(images.shape, generator=batch.generator, device=images.device)
                start = (images + threat_model.project(noise)).clamp(0, 1)
                adversarial = ascend(divergence, images, threat_model, self.attack, start=start)
        clean_logits, logits = model(images), model(adversarial)
        divergences = F.kl_div(
            F.log_softmax(logits, dim=1), F.log_softmax(clean_logits, dim=1), reduction="batchmean", log_target=True
        )
        return self.cross_entropy(clean_logits, batch.labels) + self.config.trades_beta * divergences, logits

    def chance_loss(self, classes: int) -> float:
        return (1 + self.config.trades_beta) * math.log(classes)


OBJECTIVES: dict[str, type[Objective]] = {"pgd": Objective, "fast": Fast, "free": Free, "trades": Trades}
