"""Augmentation on uint8 images, as usual in ImageNet and CIFAR training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from robust_backbones.errors import check_choice, check_crop, check_not_negative, check_seeds

AUGMENTATIONS = ("resized_crop", "padded_crop", "robustness", "color_jitter", "heavy")
# Of the RGB values of ImageNet (Krizhevsky et al. 2012), as the library `robustness` has them: a column an eigenvector.
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def augmentation(name: str, size: int, *, min_crop_scale: float, interpolation: str = "bilinear") -> v2.Transform:
    """The transform of training images: one of AUGMENTATIONS, to ``size`` x ``size`` pixels.

    Raises:
        InputError: there is none of this name.
    """
    check_choice("augmentation", name, AUGMENTATIONS)
    if name == "resized_crop":
        return train_transform(size, min_crop_scale=min_crop_scale, interpolation=interpolation)
    if name in _AFTER_CROP:
        crop = train_transform(size, min_crop_scale=min_crop_scale, interpolation=interpolation)
        return v2.Compose([crop, *_AFTER_CROP[name]()])
    # As CIFAR has it: the image with a black border, and flip; one whose shorter side is not ``size`` is resized first.
    resize = v2.Resize(size, InterpolationMode(interpolation), antialias=True)
    return v2.Compose([resize, v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])


def mixing(mixup: float, cutmix: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, by their alphas, one of them drawn each time.

    float images (N, 3, H, W) and class indices (N,) -> images and class probabilities (N, classes). It draws from the
    global generator. None if both are 0.
    """
    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    found = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(found) if found else None


def train_transform(size: int, *, min_crop_scale: float, interpolation: str = "bilinear") -> v2.Transform:
    """Random resized crop and flip, as in ImageNet training; ``min_crop_scale`` is a share of the area."""
    return _RandomCropAndFlip(
        size, (min_crop_scale, 1.0), interpolation=InterpolationMode(interpolation), antialias=True
    )


class _RandomCropAndFlip(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for one image, without the search for other inputs.

    Same draws, bit-identical results. torchvision's overhead around the two operations is a third of their cost.
    """

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, size, size)."""
        top, left, height, width = self.make_params([image]).values()
        patch = image[None, :, top : top + height, left : left + width]
        if [height, width] != list(self.size):
            patch = F.interpolate(patch, self.size, mode=self.interpolation.value, antialias=True)
        return (patch.flip(-1) if torch.rand(1) < 0.5 else patch)[0]


class Lighting(torch.nn.Module):
    """One random colour for the whole image along ImageNet's principal components (Krizhevsky et al. 2012).

    As in the library `robustness`, whose images are floats; here the sum is rounded and clipped to uint8, which changes
    values within [0, 1] by half a level at most.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) -> the same."""
        weights = torch.empty(3).normal_(0, self.std) * torch.tensor(PCA_VALUES)
        shift = 255 * torch.tensor(PCA_VECTORS) @ weights
        return (image + shift[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


_AFTER_CROP: dict[str, Callable[[], list[torch.nn.Module]]] = {
    "robustness": lambda: [v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1), Lighting(0.05)],
    "color_jitter": lambda: [v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)],
    # timm's rand-m9: 9 of its 10 levels are 27 of torchvision's 30. Erased is what becomes 0, not noise as in timm.
    "heavy": lambda: [v2.RandAugment(num_ops=2, magnitude=27), v2.RandomErasing(0.25)],
}
"""The transforms after crop and flip."""


def val_transform(size: int, *, resize: int, interpolation: str = "bilinear") -> v2.Transform:
    """Shorter side to ``resize``, then the central ``size`` x ``size`` pixels."""
    return v2.Compose([v2.Resize(resize, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(size)])


@dataclass(frozen=True, kw_only=True)
class EvaluationImages:
    """How images are resized and cropped in evaluation: the part of a config that ``models.fed_as`` fills."""

    image_size: int = 0
    """Side of the images; 0: the network's own, such as `pretrain` trained it at, or 224, or 32 with a cifar stem."""
    val_resize: int = 0
    """Shorter side of images before the central crop of ``image_size`` in evaluation; 0: the network's own, or 256;
    ``image_size`` if that is larger."""
    interpolation: str = ""
    """bilinear or bicubic; empty: the network's own, bilinear for a ResNet."""

    def __post_init__(self) -> None:
        check_not_negative(self, "image_size", "val_resize")
        check_seeds(self)
        check_crop(self)

    def crop_warnings(self) -> list[str]:
        """A line to print if evaluation sees a small part of each image, as where ``image_size`` alone is given."""
        if self.val_resize <= 1.5 * self.image_size:
            return []
        return [
            f"warning: validation sees {self.image_size} px cut from images of {self.val_resize} px: "
            f"--val-resize {round(self.image_size * 256 / 224)} would leave as much of them as is usual"
        ]

    def val_transform(self) -> v2.Transform:
        """The transform of images in evaluation."""
        return val_transform(self.image_size, resize=self.val_resize, interpolation=self.interpolation)
