"""Classification data in ImageNet's layout, one folder a class, with augmentation that only the seed decides."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from robust_backbones.errors import InputError


class ClassificationFolder(ImageFolder):
    """Items are (uint8 image of shape (3, size, size), class index); classes are the folders in sorted order.

    The random part of an item depends on (seed, epoch, index) alone: not on workers, order or device.

    Raises:
        InputError: the folder is missing, holds no class, or a class holds no image; on access, an unreadable image.
    """

    def __init__(self, root: Path, transform: v2.Transform, *, seed: int = 0) -> None:
        if not root.is_dir():
            raise InputError(f"no folder {root}: expected one folder of images a class in it")
        try:
            super().__init__(str(root), transform=transform)
        except FileNotFoundError as error:  # torchvision says which classes are empty, in several lines
            raise InputError(f"cannot use {root}: {str(error).splitlines()[0].rstrip('. ')}; add or remove") from None
        self.seed = seed
        self.epoch = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = v2.functional.pil_to_tensor(file.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            raise InputError(f"cannot read the image {path} ({type(error).__name__}): mend or remove it") from None
        # torchvision's transforms draw from the global generator only: lend it a seed of our own for one image.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self.seed, self.epoch, index))
            return self.transform(image), label


def _mix(seed: int, epoch: int, index: int) -> int:
    """A 62-bit seed for one image of one epoch; tuples of integers hash the same in every process."""
    return hash((seed, epoch, index)) & (2**62 - 1)


def train_transform(size: int, *, min_crop_scale: float) -> v2.Transform:
    """Random resized crop and flip, as ImageNet training has it; ``min_crop_scale`` is a share of the area."""
    return v2.Compose(
        [v2.RandomResizedCrop(size, scale=(min_crop_scale, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    )


def val_transform(size: int, *, resize: int) -> v2.Transform:
    """Shorter side to ``resize``, then the central ``size`` x ``size`` pixels."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


def train_loader(dataset: ClassificationFolder, batch_size: int, *, epoch: int, workers: int) -> DataLoader:
    """One epoch in an order that only (seed, epoch) decides; an incomplete last batch is dropped."""
    dataset.epoch = epoch
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(_mix(dataset.seed, epoch, -1)))
    return DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, drop_last=True, pin_memory=torch.cuda.is_available()
    )


def val_loader(dataset: ClassificationFolder, batch_size: int, *, workers: int) -> DataLoader:
    """All images once, in order."""
    order = SequentialSampler(dataset)
    return DataLoader(dataset, batch_size, sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available())
