"""Augmentation on uint8 images: what ImageNet and CIFAR training have always done."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from robust_backbones.errors import check_choice

AUGMENTATIONS = ("resized_crop", "padded_crop")


def augmentation(name: str, size: int, *, min_crop_scale: float) -> v2.Transform:
    """What training images go through: one of AUGMENTATIONS, to ``size`` x ``size`` pixels.

    Raises:
        InputError: there is none of this name.
    """
    check_choice("augmentation", name, AUGMENTATIONS)
    if name == "resized_crop":
        return train_transform(size, min_crop_scale=min_crop_scale)
    # As CIFAR has it: the image with a black border, and flip; one whose shorter side is not ``size`` is resized first.
    return v2.Compose([v2.Resize(size, antialias=True), v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])


def train_transform(size: int, *, min_crop_scale: float) -> v2.Transform:
    """Random resized crop and flip, as ImageNet training has it; ``min_crop_scale`` is a share of the area."""
    return _RandomCropAndFlip(size, scale=(min_crop_scale, 1.0), antialias=True)


class _RandomCropAndFlip(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for one image, without the search for other inputs.

    Same draws, same bits. What torchvision does around the two operations costs a third of what they cost.
    """

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size)."""
        top, left, height, width = self.make_params([image]).values()
        patch = image[None, :, top : top + height, left : left + width]
        if [height, width] != list(self.size):
            patch = F.interpolate(patch, self.size, mode="bilinear", antialias=True)
        return (patch.flip(-1) if torch.rand(1) < 0.5 else patch)[0]


def val_transform(size: int, *, resize: int) -> v2.Transform:
    """Shorter side to ``resize``, then the central ``size`` x ``size`` pixels."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])
