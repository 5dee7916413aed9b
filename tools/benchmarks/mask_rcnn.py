"""Steps of Mask R-CNN training: ours in bfloat16 against Detectron2's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from benchmarks.detectors import random_detector
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work

DEFAULT = "Detectron2's default, fp32"
BF16 = "ours, bf16"


@dataclass(frozen=True, kw_only=True)
class MaskRCNN(Work):
    """A training step of Mask R-CNN R50-FPN."""

    name: ClassVar[str] = "mask-rcnn"
    title: ClassVar[str] = "Mask R-CNN R50-FPN training step"
    on_gpu: ClassVar[bool] = True

    height: int = 320
    width: int = 448
    batch_size: int = 2

    def ways(self) -> list[Way]:
        options = {"height": self.height, "width": self.width, "batch_size": self.batch_size}
        return [
            Way(name, "mask_rcnn:step", {**options, "bf16": bf16}) for name, bf16 in ((DEFAULT, False), (BF16, True))
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """The proposal network's losses; behind it, rounding chooses among a random network's boxes."""
        if BF16 not in results:
            return []
        gap = abs(float(results[BF16]["loss"]) / float(results[DEFAULT]["loss"]) - 1)
        return [Check("RPN's first losses, relative gap of bf16 to fp32", gap, 1e-2)]

    def reaches(self) -> list[Reach]:
        return [Reach(BF16, DEFAULT, at_least=1.9)]

    @property
    def units(self) -> tuple[int, str]:
        return self.batch_size, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.batch_size} images of {self.height} x {self.width} px, frozen norms, random weights, SGD; bf16 is "
            "`SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16`. The channels-last layout did not pay on CPUs and is "
            "no option."
        )


def step(*, height: int, width: int, batch_size: int, bf16: bool, device: str) -> Side:
    from detectron2.utils.events import EventStorage

    model, samples = random_detector((height, width), images=batch_size, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    first: list[float] = []

    def run() -> None:
        torch.manual_seed(1)  # the same anchors are drawn
        with EventStorage(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses = model(samples)
            loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not first:
            first.append(float(losses["loss_rpn_cls"] + losses["loss_rpn_loc"]))

    return Side(run, lambda: {"loss": np.array(first[0])})
