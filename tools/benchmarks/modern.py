"""Steps of Mask R-CNN training on ConvNeXt and ViT, with activations kept and with activations recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from benchmarks.detectors import CONFIG, random_detector
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Work

RECOMPUTED = ", activations recomputed"
GIGABYTES = 80
"""Of the GPU that a step with recomputed activations is to fit on."""


@dataclass(frozen=True, kw_only=True)
class Modern(Work):
    """A training step of Mask R-CNN on ConvNeXt-T and ViT-B; on a GPU in bf16, 16 images of 1024 px."""

    name: ClassVar[str] = "mask-rcnn-modern"
    title: ClassVar[str] = "Mask R-CNN training step on ConvNeXt-T and ViT-B"
    on_gpu: ClassVar[bool] = True

    networks: tuple[str, ...] = ("convnext_t", "vit_b")
    """Of detectron_configs/architectures."""
    size: int = 0
    """Pixels of the images' sides; 0: 1024 on a GPU, 256 on a CPU."""
    batch_size: int = 0
    """0: 16 on a GPU, 1 on a CPU."""

    @property
    def _work(self) -> tuple[int, int]:
        size, batch_size = (1024, 16) if self.device == "cuda" else (256, 1)
        return self.size or size, self.batch_size or batch_size

    def ways(self) -> list[Way]:
        size, batch_size = self._work
        shared = {"size": size, "batch_size": batch_size}
        return [
            Way(name + suffix, "modern:step", {**shared, "network": name, "recompute": bool(suffix)})
            for name in self.networks
            for suffix in ("", RECOMPUTED)
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        checks = []
        for name in self.networks:
            kept, recomputed = results[name], results[name + RECOMPUTED]
            gap = abs(float(recomputed["loss"]) / float(kept["loss"]) - 1)
            limit = 1e-2 if self.device == "cuda" else 1e-4
            checks.append(Check(f"{name}: first loss with recomputed activations, relative gap", gap, limit))
            checks.append(Check(f"{name}: GB on the GPU, recomputed", float(recomputed["gigabytes"]), GIGABYTES))
        return checks

    @property
    def units(self) -> tuple[int, str]:
        return self._work[1], "image"

    @property
    def remark(self) -> str:
        size, batch_size = self._work
        return (
            f"{batch_size} images of {size} x {size} px, random weights, drop path of the architecture, AdamW; "
            f"in {'bf16' if self.device == 'cuda' else 'fp32'}. Recomputed is `MODEL.BACKBONE.USE_ACT_CHECKPOINT True`."
        )


def step(*, network: str, size: int, batch_size: int, recompute: bool, device: str) -> Side:
    from detectron2.utils.events import EventStorage

    overrides: list[object] = ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.BACKBONE.USE_ACT_CHECKPOINT", recompute]
    files = [CONFIG, CONFIG.parents[1] / f"architectures/{network}.yaml"]
    _, model, samples = random_detector(
        (size, size), images=batch_size, device=device, config=files, overrides=overrides
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    first: Arrays = {}

    def run() -> None:
        torch.manual_seed(1)  # the same anchors are drawn, and the same paths dropped
        with EventStorage(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sum(model(samples).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not first:
            most = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            first.update({"loss": np.array(float(loss)), "gigabytes": np.array(most / 1e9)})

    return Side(run, lambda: first)
