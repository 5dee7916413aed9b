"""Adversarial training of detectors: what changes the images of a batch before the weights learn from them.

The adversary climbs the detector's own training loss, the sum of all its terms, and acts on the images as the detector
gets them: augmented, resized and not yet normalised. An image is a tensor of shape (3, H, W) in levels of 0 to 255, and
each image of a batch, whatever its size, has a ball of its own. With epsilon 0 the images stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robust_backbones.detection.attacks import frozen_losses
from robust_backbones.threat_models import ThreatModel

Batch = list[dict[str, Any]]
"""Detectron2's dictionaries, one an image; ``image`` is what the adversary changes."""

# Keeps small gradients alive in float16: GradScaler's own first scale. It changes no direction and, as a power of two,
# no digit in float32 and bfloat16.
_GRADIENT_SCALE = 2.0**16


def replays(cfg: CfgNode) -> int:
    """How many updates of the weights, that is iterations, each batch is good for."""
    return cfg.ADVERSARIAL.REPLAYS if cfg.ADVERSARIAL.KIND == "free" else 1


class FreeStream:
    """The batches of ``stream``, each ADVERSARIAL.REPLAYS times, for free training (Shafahi et al. 2019, algorithm 1).

    Whoever iterates runs ``backward`` once on each for the gradients of the weights. That pass leaves those of the
    images here, too, and the next replay comes with every image one step of size epsilon further up: an iteration costs
    what it costs in standard training, and the way back through stages that are frozen.

    In Shafahi et al. a batch starts with the perturbation of the one before. Images of a detector differ in size, so it
    starts anew here: at 0, which makes the first replay one of clean images, or, with ADVERSARIAL.RANDOM_START, at a
    random point of the ball.
    """

    def __init__(self, stream: Iterable[Batch], cfg: CfgNode) -> None:
        self._stream = stream
        self._adversary = _Adversary(cfg)
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._replays = replays(cfg)

    def __iter__(self) -> Iterator[Batch]:
        adversary = self._adversary
        for batch in self._stream:
            if adversary.ball.epsilon == 0:
                for _ in range(self._replays):
                    yield batch
                continue
            clean = _images(batch, self._device)
            points = adversary.start(clean)
            for replay in range(self._replays):
                if replay > 0:
                    gradients = [point.grad for point in points if point.grad is not None]
                    points = adversary.ascend(points, gradients, clean, adversary.ball.epsilon)
                points = [point.detach().requires_grad_() for point in points]
                yield _with_images(batch, points)


class AttackedDetector(nn.Module):
    """A detector that is trained on what PGD makes of the images, and on nothing else (Madry et al. 2018, eq. 2.1).

    ADVERSARIAL.STEPS steps of ADVERSARIAL.RELATIVE_STEP_SIZE epsilon climb the loss at the present weights. Proposals
    and the regions that the losses are taken over are drawn anew at each step, as they are in training.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        """``model``: what the weights are trained through, that is the detector or DistributedDataParallel of it."""
        super().__init__()
        self.model = model
        self._adversary = _Adversary(cfg)
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._steps = cfg.ADVERSARIAL.STEPS
        self._step_size = cfg.ADVERSARIAL.RELATIVE_STEP_SIZE * self._adversary.ball.epsilon

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The training losses on the attacked images, by their names."""
        return self.model(self.attack(batch))

    def attack(self, batch: Batch) -> Batch:
        """``batch`` with images within the ball around its own; weights, gradients and statistics stay as they are."""
        adversary = self._adversary
        if adversary.ball.epsilon == 0:
            return batch
        # Each process attacks its own images: nothing of this is for DistributedDataParallel to know.
        detector = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        clean = _images(batch, self._device)
        points = adversary.start(clean)
        # Detectors count what they sample and how often they are right: not here, where nothing is trained.
        with frozen_losses(detector), EventStorage():
            for _ in range(self._steps):
                points = [point.detach().requires_grad_() for point in points]
                with torch.enable_grad():
                    loss = sum(detector(_with_images(batch, points)).values())
                gradients = torch.autograd.grad(_GRADIENT_SCALE * loss, points)
                points = adversary.ascend(points, gradients, clean, self._step_size)
        return _with_images(batch, points)


class _Adversary:
    """Where the perturbation of each image of a batch may be, where it starts and how it climbs."""

    def __init__(self, cfg: CfgNode) -> None:
        threat_model = ThreatModel.parse(cfg.ADVERSARIAL.THREAT_MODEL)
        self.ball = ThreatModel(threat_model.norm, 255 * threat_model.epsilon)
        self._random_start = cfg.ADVERSARIAL.RANDOM_START

    def start(self, clean: Sequence[Tensor]) -> list[Tensor]:
        if not self._random_start:
            return list(clean)
        return [(image + self.ball.random_start(image[None])[0]).clamp(0, 255) for image in clean]

    def ascend(
        self, points: Sequence[Tensor], gradients: Sequence[Tensor], clean: Sequence[Tensor], step_size: float
    ) -> list[Tensor]:
        """One step up from ``points``, back into the balls around ``clean`` and into the range of pixels."""
        climbed = []
        for point, gradient, image in zip(points, gradients, clean, strict=True):
            # Where float16 overflowed there is no direction; GradScaler leaves the weights as they are then.
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
            step = step_size * self.ball.ascent_direction(gradient[None])[0]
            delta = self.ball.project((point.detach() + step - image)[None])[0]
            # Clipping moves every pixel towards the clean one: the point stays in the ball.
            climbed.append((image + delta).clamp(0, 255))
        return climbed


def _images(batch: Batch, device: torch.device) -> list[Tensor]:
    return [item["image"].to(device).float() for item in batch]


def _with_images(batch: Batch, images: Sequence[Tensor]) -> Batch:
    return [{**item, "image": image} for item, image in zip(batch, images, strict=True)]
