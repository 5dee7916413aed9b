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
CHANNELS_LAST = "fp32, channels last"
BF16 = "bf16"
BF16_CHANNELS_LAST = "bf16, channels last"


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
            Way(name, "mask_rcnn:step", {**options, "bf16": bf16, "channels_last": channels_last})
            for name, bf16, channels_last in (
                (DEFAULT, False, False),
                (CHANNELS_LAST, False, True),
                (BF16, True, False),
                (BF16_CHANNELS_LAST, True, True),
            )
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """The proposal network's losses; behind it, rounding chooses among a random network's boxes."""
        reference = float(results[DEFAULT]["loss"])
        limits = {CHANNELS_LAST: 1e-5, BF16: 1e-2, BF16_CHANNELS_LAST: 1e-2}
        return [
            Check(f"{way}: RPN's first losses, relative gap", abs(float(results[way]["loss"]) / reference - 1), limit)
            for way, limit in limits.items()
        ]

    def reaches(self) -> list[Reach]:
        return [Reach(BF16_CHANNELS_LAST, DEFAULT, at_least=1.9)]

    @property
    def units(self) -> tuple[int, str]:
        return self.batch_size, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.batch_size} images of {self.height} x {self.width} px, frozen norms, random weights, SGD. The rows "
            "are switches: `SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16` and `MODEL.CHANNELS_LAST True`."
        )


def step(*, height: int, width: int, batch_size: int, bf16: bool, channels_last: bool, device: str) -> Side:
    from detectron2.utils.events import EventStorage

    model, samples = random_detector((height, width), images=batch_size, device=device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
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
