"""Steps of Mask R-CNN training: ours, each with one switch more, against Detectron2's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from benchmarks.detectors import arithmetic, random_detector, trainer_step
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work

DEFAULT = "Detectron2's default, fp32"
DEFAULT_BF16 = "Detectron2's AMP, bf16"
FP32 = "ours, fp32"
FAST_FP32 = "ours, MODEL.FAST_STEP, fp32"
SLOW_BF16 = "ours with torchvision's ROIAlign, bf16"
BF16 = "ours, bf16"
FAST_BF16 = "ours, MODEL.FAST_STEP, bf16"
COMPILED_BF16 = "ours, MODEL.FAST_STEP and COMPILE, bf16"


@dataclass(frozen=True, kw_only=True)
class MaskRCNN(Work):
    """A training step of Mask R-CNN R50-FPN."""

    name: ClassVar[str] = "mask-rcnn"
    title: ClassVar[str] = "Mask R-CNN R50-FPN training step"
    on_gpu: ClassVar[bool] = True

    height: int = 0
    """Pixels of the images; 0: 800 on a GPU, 320 on a CPU."""
    width: int = 0
    """0: 1216 on a GPU, 448 on a CPU."""
    batch_size: int = 0
    """0: 8 on a GPU, 2 on a CPU."""

    @property
    def _work(self) -> tuple[int, int, int]:
        """(Height, width, batch)."""
        height, width, batch_size = (800, 1216, 8) if self.device == "cuda" else (320, 448, 2)
        return self.height or height, self.width or width, self.batch_size or batch_size

    def ways(self) -> list[Way]:
        ours = {"ours": True}
        kinds: dict[str, dict[str, bool]] = {
            DEFAULT: {},
            DEFAULT_BF16: {"bf16": True},
            FP32: ours,
            FAST_FP32: ours | {"fast_step": True},
            SLOW_BF16: ours | {"fast_roi_align": False, "bf16": True},
            BF16: ours | {"bf16": True},
            FAST_BF16: ours | {"fast_step": True, "bf16": True},
        }
        if self.device == "cuda":  # there ROIAlign is torchvision's, and compiling is for it
            del kinds[SLOW_BF16]
            kinds[COMPILED_BF16] = kinds[FAST_BF16] | {"compiled": True}
        height, width, batch_size = self._work
        shared = {"height": height, "width": width, "batch_size": batch_size}
        return [Way(name, "mask_rcnn:step", {**shared, **kind}) for name, kind in kinds.items()]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """In bf16 the proposal network's losses; after it, rounding chooses among a random network's boxes.

        MODEL.FAST_STEP draws other anchors; with the same ones its losses are Detectron2's (tests).
        """
        checks = []
        for name, found in results.items():
            exact = name == FP32
            other_anchors = name in (FAST_FP32, FAST_BF16, COMPILED_BF16)
            what, limit = ("total", 1e-4) if exact else ("proposals", 0.1 if other_anchors else 1e-2)
            if name != DEFAULT:
                gap = abs(float(found[what]) / float(results[DEFAULT][what]) - 1)
                checks.append(Check(f"{name}: first loss ({what}), relative gap to {DEFAULT}", gap, limit))
        return checks

    def reaches(self) -> list[Reach]:
        if self.device == "cuda":
            return [Reach(FAST_BF16, DEFAULT_BF16, at_least=2.5)]
        return [Reach(BF16, DEFAULT, at_least=1.9)]

    @property
    def units(self) -> tuple[int, str]:
        return self._work[2], "image"

    @property
    def remark(self) -> str:
        height, width, batch_size = self._work
        return (
            f"{batch_size} images of {height} x {width} px, frozen norms, random weights, SGD; metrics are logged as "
            "each trainer logs them. bf16 is `SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16`, our ROIAlign "
            "`MODEL.FAST_ROI_ALIGN True`. The channels-last layout did not pay on CPUs and is no option."
        )


def step(
    *,
    height: int,
    width: int,
    batch_size: int,
    device: str,
    ours: bool = False,
    fast_roi_align: bool = True,
    fast_step: bool = False,
    compiled: bool = False,
    bf16: bool = False,
) -> Side:
    overrides: list[object] = ["MODEL.FAST_STEP", fast_step, "MODEL.COMPILE", compiled, "INPUT.MASK_FORMAT", "bitmask"]
    cfg, model, samples = random_detector(
        (height, width),
        images=batch_size,
        device=device,
        fast_roi_align=fast_roi_align if ours else None,
        overrides=[*overrides, "SOLVER.AMP.ENABLED", bf16, "SOLVER.AMP.DTYPE", "bfloat16"],
    )
    from detectron2.utils.events import EventStorage

    torch.manual_seed(1)  # the same anchors are drawn
    with arithmetic(cfg), EventStorage():
        found = {name: float(loss) for name, loss in model(samples).items()}
    proposals = found["loss_rpn_cls"] + found["loss_rpn_loc"]
    losses = {"proposals": np.array(proposals), "total": np.array(sum(found.values()))}
    return Side(trainer_step(cfg, model, itertools.repeat(samples)), lambda: losses)
