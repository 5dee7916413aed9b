"""Adversarial training of detectors: the images of a batch are perturbed to maximise the detector's training loss.

They are augmented and resized, but not yet normalised; each has its own ball, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robust_backbones.attacks import AttackConfig, ascend, leaves, random_point, step
from robust_backbones.detection.attacks import frozen_losses, same_normalizer
from robust_backbones.threat_models import ThreatModel

Batch = list[dict[str, Any]]
"""Detectron2's dictionaries, one per image; ``image``, shape (3, H, W) in 0-255, is what the adversary changes."""

# Beside that of ``ascend``: a detector's losses are means over hundreds of regions, small for float16.
_LOSS_SCALE = 2.0**8


def replays(cfg: CfgNode) -> int:
    """For how many weight updates (iterations) each batch is used."""
    return cfg.ADVERSARIAL.REPLAYS if cfg.ADVERSARIAL.KIND == "free" else 1


class FreeStream:
    """The batches of ``stream``, each ADVERSARIAL.REPLAYS times, for free training (Shafahi et al. 2019, algorithm 1).

    Training runs ``backward`` once on each. That pass also gives the gradients of the images, and in the next replay
    every image has moved one step of size epsilon up its gradient: an iteration costs as much as in standard training,
    plus the backward pass through frozen stages.

    In Shafahi et al. a batch starts with the perturbation of the previous one. Images of a detector differ in size, so
    here it starts anew: at 0 (the first replay is clean) or, with ADVERSARIAL.RANDOM_START, at a random point of the
    ball.
    """

    def __init__(self, stream: Iterable[Batch], cfg: CfgNode) -> None:
        self._stream, self._cfg = stream, cfg

    def __iter__(self) -> Iterator[Batch]:
        threat_model = ThreatModel.parse(self._cfg.ADVERSARIAL.THREAT_MODEL)
        for batch in self._stream:
            if threat_model.epsilon == 0:
                for _ in range(replays(self._cfg)):
                    yield batch
                continue
            clean, points = _clean_and_start(batch, threat_model, self._cfg)
            images: list[Tensor] = []
            for replay in range(replays(self._cfg)):
                if replay > 0:
                    gradients = [image.grad for image in images if image.grad is not None]
                    points = step(points, gradients, clean, threat_model, threat_model.epsilon)
                images = leaves([255 * point for point in points])
                yield _with_images(batch, images)


class AttackedDetector(nn.Module):
    """A detector that is trained only on images attacked by PGD (Madry et al. 2018, eq. 2.1).

    ADVERSARIAL.STEPS steps of ADVERSARIAL.RELATIVE_STEP_SIZE epsilon maximise the loss at the current weights.
    Proposals and the regions of the losses are sampled anew at each step, as in training.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        """``model``: the module that is trained: the detector, or DistributedDataParallel of it."""
        super().__init__()
        self.model, self._cfg = model, cfg

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The training losses on the attacked images, by their names."""
        return self.model(self.attack(batch))

    def attack(self, batch: Batch) -> Batch:
        """``batch`` with attacked images, within their balls; weights, gradients and statistics do not change."""
        adversary = self._cfg.ADVERSARIAL
        threat_model = ThreatModel.parse(adversary.THREAT_MODEL)
        if threat_model.epsilon == 0:
            return batch
        # Each process attacks its own images: nothing of this is for DistributedDataParallel to know.
        detector = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

        def loss(points: list[Tensor]) -> Tensor:
            losses = detector(_with_images(batch, [255 * point for point in points]))
            return _LOSS_SCALE * torch.stack(list(losses.values())).sum()

        clean, start = _clean_and_start(batch, threat_model, self._cfg)
        # Detectors count what they sample and how often they are right: not here, where nothing is trained.
        with frozen_losses(detector), same_normalizer(detector), EventStorage():
            attack = AttackConfig(adversary.STEPS, adversary.RELATIVE_STEP_SIZE)
            points = ascend(loss, clean, threat_model, attack, start=start)
        return _with_images(batch, [255 * point for point in points])


def _clean_and_start(batch: Batch, threat_model: ThreatModel, cfg: CfgNode) -> tuple[list[Tensor], list[Tensor]]:
    """The images of a batch, shape (3, H, W) in [0, 1], and the start of their perturbation."""
    clean = [item["image"].to(cfg.MODEL.DEVICE).float() / 255 for item in batch]
    return clean, random_point(clean, threat_model) if cfg.ADVERSARIAL.RANDOM_START else clean


def _with_images(batch: Batch, images: list[Tensor]) -> Batch:
    return [{**item, "image": image} for item, image in zip(batch, images, strict=True)]
