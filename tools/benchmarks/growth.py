"""How cost grows: with the attack's steps, batch, resolution, width, heads of a probe and images of COCO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.turns import Side, Way, take_turns
from benchmarks.work import Work
from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.classification.compute import PRECISIONS
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.config import Setting
from robust_backbones.transfer.heads import HeadBank


@dataclass(frozen=True, kw_only=True)
class Growth(Work):
    """Growth of cost with steps, batch, resolution, width, heads and images; slopes are fitted."""

    name: ClassVar[str] = "growth"
    title: ClassVar[str] = "How cost grows"
    on_gpu: ClassVar[bool] = True

    annotations: Path
    """An instances_*.json, for the AP of more and more images."""
    precision: str = "fp32"
    image_size: int = 64
    batch_size: int = 16
    steps: tuple[int, ...] = (1, 2, 3, 5, 7, 10)
    batches: tuple[int, ...] = (16, 32, 64, 128)
    sizes: tuple[int, ...] = (64, 96, 128, 192)
    widths: tuple[int, ...] = (1, 2, 4)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    coco_images: tuple[int, ...] = (250, 500, 1000, 2000)

    @property
    def remark(self) -> str:
        return (
            f"The attack is PGD on a ResNet-50 at {self.image_size} px, batch {self.batch_size}, one step where steps "
            "are not what varies. Heads are linear classifiers of 100 classes on 2,048 features, an epoch of 512 "
            "images. The exponent p is that of the power law cost = a · x^p through all points, by least squares of "
            "the logarithms: 1 is proportional, 2 quadratic."
        )

    def series(self) -> dict[str, list[tuple[int, Way]]]:
        attack = {
            "width": 1,
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "steps": 1,
            "precision": self.precision,
        }

        def of(key: str, values: tuple[int, ...]) -> list[tuple[int, Way]]:
            return [(value, Way(f"{key} {value}", "growth:attack", {**attack, key: value})) for value in values]

        coco = {"annotations": str(self.annotations), "false_detections": 18, "task": "bbox"}
        return {
            "attack steps": of("steps", self.steps),
            "batch": of("batch_size", self.batches),
            "resolution (px)": of("image_size", self.sizes),
            "width": of("width", self.widths),
            "heads of a probe": [
                (count, Way(f"heads {count}", "growth:heads", {"count": count})) for count in self.heads
            ],
            "COCO images, box AP": [
                (images, Way(f"COCO {images}", "coco:ours", {**coco, "images": images})) for images in self.coco_images
            ],
        }

    def measure(self) -> dict[str, Any]:
        found = []
        for name, points in self.series().items():
            times = take_turns(
                [way for _, way in points],
                lambda results: None,
                rounds=self.rounds,
                warm_up=3 if self.device == "cuda" else self.warm_up,
                threads=self.threads,
                device=self.device,
                peers_python=lambda: Path(),
            )
            rows = [{"x": x, "seconds": times[way.name].seconds} for x, way in points]
            found.append({"series": name, "points": rows})
        return self.write({"growth": found})


def attack(*, width: int, image_size: int, batch_size: int, steps: int, precision: str, device: str) -> Side:
    arch = {1: "resnet50", 2: "wide_resnet50_2", 4: "wide_resnet50_4"}[width]
    spec = BackboneSpec(arch, 100)
    model = NormalizedModel(build_backbone(spec), spec).to(device, memory_format=torch.channels_last).eval()
    twin = FoldedTwin(model, PRECISIONS[precision])
    del model
    images = torch.rand(batch_size, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 100
    config = AttackConfig(steps=steps)
    return Side(lambda: pgd(twin, images, labels, ThreatModel("L2", 1.0), config))


def heads(*, count: int, device: str) -> Side:
    classes, dim, images, seeds = 100, 2048, 512, (0, 1, 2)
    settings = [Setting(lr=0.01 / (1 + place), weight_decay=5e-4) for place in range(count // len(seeds))]
    layers = [torch.nn.Linear(dim, classes) for _ in seeds]
    bank = HeadBank(layers, settings, momentum=0.9, device=torch.device(device))
    features = torch.randn(images, dim, device=device)
    labels = torch.arange(images, device=device) % classes
    orders = torch.stack([torch.randperm(images) for _ in seeds]).to(device)
    return Side(lambda: bank.train_epoch(features, labels, orders, batch_size=64, rate=1.0))
