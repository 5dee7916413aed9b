"""Image files to training crops: ours against torchvision's ImageFolder with Pillow and ToTensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.decoding import ResizedCache
from robust_backbones.data.transforms import train_transform

PILLOW = "ImageFolder, Pillow, ToTensor"


@dataclass(frozen=True, kw_only=True)
class Loading(Work):
    """JPEG files to random crops of 224 px, by one process."""

    name: ClassVar[str] = "loading"
    title: ClassVar[str] = "JPEG files to training crops"

    data: Path
    """Folder of photographs."""
    images: int = 300
    image_size: int = 224
    rounds: int = 7

    def ways(self) -> list[Way]:
        folder = self.output / "photographs"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "all"  # both sides read folders of class folders
        link.unlink(missing_ok=True)
        link.symlink_to(self.data.resolve(), target_is_directory=True)
        options = {"data": str(folder), "images": self.images, "image_size": self.image_size}
        cache = str(self.output / "cache")
        return [
            Way(PILLOW, "loading:pillow", options),
            Way("ours", "loading:ours", options),
            Way("ours, cache of 256 px", "loading:ours", {**options, "cache": cache}),
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        pillow, ours = results[PILLOW]["decoded"], results["ours"]["decoded"]
        return [
            Check("decoded pixels that differ from Pillow's", float((pillow != ours).sum()), 0.0),
        ]

    def reaches(self) -> list[Reach]:
        return [Reach("ours", PILLOW, at_least=1.7)]

    @property
    def units(self) -> tuple[int, str]:
        return self.images, "image"

    @property
    def remark(self) -> str:
        return (
            "One process, no workers: images a second and core. Ours gives uint8 (a device divides by 255), "
            "Pillow's way float32. The check is over every pixel of the decoded photographs; crops differ in the last "
            "bit, as the two ways resize with other roundings."
        )


def pillow(*, data: str, images: int, image_size: int, device: str) -> Side:
    from PIL import Image
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(image_size)
    dataset = ImageFolder(data, transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]))
    positions = _positions(len(dataset), images)

    def decoded() -> Arrays:
        paths = [dataset.samples[position][0] for position in positions]
        return {"decoded": np.concatenate([np.asarray(Image.open(path).convert("RGB")).ravel() for path in paths])}

    return Side(lambda: [dataset[position] for position in positions], decoded)


def ours(*, data: str, images: int, image_size: int, device: str, cache: str = "") -> Side:
    transform = train_transform(image_size, min_crop_scale=0.08)
    dataset: ClassificationDataset = open_dataset(
        Path(data), transform, cache=ResizedCache(Path(cache), 256) if cache else None
    )
    positions = _positions(len(dataset), images)

    def decoded() -> Arrays:
        pixels = [dataset.load(position).permute(1, 2, 0).numpy().ravel() for position in positions]
        return {"decoded": np.concatenate(pixels)}

    return Side(lambda: [dataset[position] for position in positions], decoded)


def _positions(available: int, wanted: int) -> list[int]:
    """The same images for all ways, some twice where there are not enough."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[index % available] for index in range(wanted)]
