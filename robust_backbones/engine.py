"""One epoch of (adversarial) training, and clean / robust accuracy: the loops every classifier here shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """Where and in what arithmetic a network runs. Images, perturbations and losses are always float32."""

    device: torch.device
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def to_unit_range(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 in [0, 1] on the device; channels last, which convolutions like best."""
        images = images.to(self.device, non_blocking=True).float() / 255
        return images.contiguous(memory_format=torch.channels_last)


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    threat_model: ThreatModel,
    attack: AttackConfig,
    compute: Compute,
    *,
    generator: torch.Generator | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Minimise the worst-case loss over the threat model, one step a batch (Salman et al. 2020, eq. 2).

    The scheduler steps once a batch. At epsilon 0 this is standard training.

    Returns:
        ``train_loss`` (nats) and ``train_accuracy`` (0-100), on the adversarial images.
    """
    model.train()
    total_loss = correct = torch.zeros((), device=compute.device)
    count = 0
    for images, labels in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
        images, labels = compute.to_unit_range(images), labels.to(compute.device, non_blocking=True)
        with compute.autocast():
            adversarial = pgd(model, images, labels, threat_model, attack, generator=generator)
            logits = model(adversarial).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # Sums stay on the device: reading them every step would make a GPU wait.
        total_loss = total_loss + loss.detach() * len(labels)
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(labels)
    return {"train_loss": total_loss.item() / count, "train_accuracy": 100 * correct.item() / count}


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    threat_model: ThreatModel,
    attack: AttackConfig,
    compute: Compute,
    *,
    generator: torch.Generator | None = None,
    description: str = "evaluate",
) -> dict[str, float]:
    """Top-1 accuracy on images as they are and on their worst neighbours that PGD finds.

    Returns:
        ``clean_accuracy`` and ``robust_accuracy``, 0-100; equal at epsilon 0. An image counts as robust only if it is
        also right when clean, so that the second can never exceed the first.
    """
    was_training = model.training
    model.eval()
    clean = robust = torch.zeros((), device=compute.device)
    count = 0
    for images, labels in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
        images, labels = compute.to_unit_range(images), labels.to(compute.device, non_blocking=True)
        with compute.autocast():
            adversarial = pgd(model, images, labels, threat_model, attack, generator=generator)
            with torch.no_grad():
                right = model(images).argmax(1) == labels
                still_right = right & (model(adversarial).argmax(1) == labels)
        clean = clean + right.sum()
        robust = robust + still_right.sum()
        count += len(labels)
    model.train(was_training)
    return {"clean_accuracy": 100 * clean.item() / count, "robust_accuracy": 100 * robust.item() / count}
