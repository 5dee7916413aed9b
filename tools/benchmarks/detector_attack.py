"""Steps of the attacks on a Mask R-CNN against a training forward and backward pass on the same image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.detectors import random_detector
from benchmarks.turns import Side, Way
from benchmarks.work import Work

TRAINING = "training, forward and backward"
LOSSES = ("classification", "localization", "objectness", "total", "mask")


@dataclass(frozen=True, kw_only=True)
class DetectorAttack(Work):
    """Cost of an attack's step on a Mask R-CNN, in units of its training pass."""

    name: ClassVar[str] = "detector-attack"
    title: ClassVar[str] = "A step of an attack on a detector"
    on_gpu: ClassVar[bool] = True

    height: int = 192
    width: int = 256
    steps: int = 2
    """Of each turn."""
    rounds: int = 5

    def ways(self) -> list[Way]:
        options = {"height": self.height, "width": self.width, "steps": self.steps}
        return [
            Way(TRAINING, "detector_attack:train", options),
            *(Way(f"attack step, {loss} loss", "detector_attack:attack", {**options, "loss": loss}) for loss in LOSSES),
        ]

    @property
    def units(self) -> tuple[int, str]:
        return self.steps, "step"

    @property
    def remark(self) -> str:
        return f"Mask R-CNN with ResNet-50 and FPN, random weights, one image of {self.height} x {self.width} px."


def train(*, height: int, width: int, steps: int, device: str) -> Side:
    from detectron2.utils.events import EventStorage

    _, model, samples = random_detector((height, width), images=1, device=device)

    def run() -> None:
        for _ in range(steps):
            with EventStorage():
                sum(model(samples).values()).backward()
            model.zero_grad()

    return Side(run)


def attack(*, height: int, width: int, steps: int, loss: Any, device: str) -> Side:
    from robust_backbones.attacks import ascend
    from robust_backbones.detection.attacks import DetectorAttack as Config
    from robust_backbones.detection.attacks import frozen_losses, loss_function
    from robust_backbones.threat_models import ThreatModel

    _, model, samples = random_detector((height, width), images=1, device=device)
    image = samples[0]["image"][None].to(model.device) / 255
    config = Config(threat_model=ThreatModel("Linf", 4 / 255), loss=loss, steps=steps)

    def run() -> torch.Tensor:
        with frozen_losses(model):
            return ascend(loss_function(model, samples[0], config), image, config.threat_model, config, start=image)

    return Side(run)
