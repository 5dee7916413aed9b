"""Steps of Mask R-CNN training: ours, with its own ROIAlign and in bfloat16, against Detectron2's default."""

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
FP32 = "ours, fp32"
SLOW_BF16 = "ours with torchvision's ROIAlign, bf16"
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
        kinds: dict[str, dict[str, object]] = {
            DEFAULT: {"fast_roi_align": None, "bf16": False},
            FP32: {"fast_roi_align": True, "bf16": False},
            SLOW_BF16: {"fast_roi_align": False, "bf16": True},
            BF16: {"fast_roi_align": True, "bf16": True},
        }
        return [Way(name, "mask_rcnn:step", {**options, **kind}) for name, kind in kinds.items()]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """In bf16 the proposal network's losses; behind it, rounding chooses among a random network's boxes."""
        checks = []
        for name, what, limit in ((FP32, "total", 1e-4), (SLOW_BF16, "proposals", 1e-2), (BF16, "proposals", 1e-2)):
            if name in results:
                gap = abs(float(results[name][what]) / float(results[DEFAULT][what]) - 1)
                checks.append(Check(f"{name}: first loss ({what}), relative gap to {DEFAULT}", gap, limit))
        return checks

    def reaches(self) -> list[Reach]:
        return [Reach(BF16, DEFAULT, at_least=1.9)]

    @property
    def units(self) -> tuple[int, str]:
        return self.batch_size, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.batch_size} images of {self.height} x {self.width} px, frozen norms, random weights, SGD; bf16 is "
            "`SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16`, our ROIAlign `MODEL.FAST_ROI_ALIGN True`. "
            "The channels-last layout did not pay on CPUs and is no option."
        )


def step(*, height: int, width: int, batch_size: int, fast_roi_align: bool | None, bf16: bool, device: str) -> Side:
    from detectron2.utils.events import EventStorage

    _, model, samples = random_detector(
        (height, width), images=batch_size, device=device, fast_roi_align=fast_roi_align
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    first: Arrays = {}

    def run() -> None:
        torch.manual_seed(1)  # the same anchors are drawn
        with EventStorage(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses = model(samples)
            loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not first:
            proposals = losses["loss_rpn_cls"] + losses["loss_rpn_loc"]
            first.update({"proposals": np.array(float(proposals)), "total": np.array(float(loss))})

    return Side(run, lambda: first)
