"""Data sets of some pre-training classes, to which logits are masked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.decoding import is_image, visible
from robust_backbones.data.images import ImageFiles, warn_of_left_out
from robust_backbones.errors import InputError, plural
from robust_backbones.transfer.inheritance.config import PRETRAINING

_MOST_PARTS = 2  # folders between a set and its classes, as CORRUPTION/SEVERITY of ImageNet-C
KNOWN_SETS = {
    "imagenet-v2": "ImageNet-V2 (Recht et al. 2019; folders are numbered 0 to 999; imagenetv2.org)",
    "imagenet-a": "ImageNet-A (Hendrycks et al. 2021; 200 classes; github.com/hendrycks/natural-adv-examples)",
    "imagenet-r": "ImageNet-R (Hendrycks et al. 2021; 200 classes; github.com/hendrycks/imagenet-r)",
    "imagenet-sketch": "ImageNet-Sketch (Wang et al. 2019; github.com/HaohanWang/ImageNet-Sketch)",
    "imagenet-cartoon": "ImageNet-Cartoon (Salvador & Oberman 2022; tiagosalvador.github.io/projects/imagenet-shift)",
    "imagenet-drawing": "ImageNet-Drawing (Salvador & Oberman 2022; tiagosalvador.github.io/projects/imagenet-shift)",
    "objectnet": "ObjectNet (Barbu et al. 2019; 113 classes: its folders must first be renamed to ImageNet's, the "
    "others left out; objectnet.dev)",
    "imagenet-c": "ImageNet-C (Hendrycks & Dietterich 2019; as CORRUPTION/SEVERITY/CLASS, 15 x 5 parts; "
    "github.com/hendrycks/robustness)",
}
"""The eight sets of ImageNet-RIB by the names of their folders, with where to get them."""


@dataclass(frozen=True)
class RelatedSet:
    """Images of some classes of the pre-training set, to which a network's logits are masked."""

    name: str
    images: ClassificationDataset
    classes: tuple[int, ...]
    """The mask: indices of the set's classes among those of pre-training, ascending; label l stands for classes[l]."""

    def limited(self, count: int, *, seed: int) -> RelatedSet:
        """``count`` of its images, drawn by ``seed``; all if 0 or more than there are. The mask does not change."""
        if not 0 < count < len(self.images):
            return self
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, images=self.images.take(sorted(order.tolist())))


def open_related_set(root: Path, class_names: Sequence[str], transform: v2.Transform, *, name: str = "") -> RelatedSet:
    """The images below ``root``, in folders named like pre-training classes, or by their numbers.

    Subsets in folders in between, such as ImageNet-C's corruptions and severities, form one set together.

    Args:
        class_names: of the pre-training set, in the order of the network's outputs.
        name: what the set is called; the folder's name when not given.

    Raises:
        InputError: no such folder, a class that is not in pre-training, or one without images.
    """
    if not root.is_dir():
        known = KNOWN_SETS.get(root.name)
        hint = f"get {known}" if known else f"or one of {', '.join(KNOWN_SETS)} in --data-root"
        raise InputError(f"no related data set at {root}: give a folder that holds class folders, {hint}")
    found = _class_folders(root, {name: index for index, name in enumerate(class_names)}, _MOST_PARTS)
    classes = tuple(sorted({index for index, _ in found}))
    position = {index: label for label, index in enumerate(classes)}
    names, labels, left_out = [], [], list[str]()
    for index, folder in found:
        every = sorted(
            Path(place, name) for place, _, names_there in os.walk(folder, followlinks=True) for name in names_there
        )
        files = [path for path in every if is_image(str(path.relative_to(folder)))]
        left_out += map(str, {*every} - {*files})
        if not files:
            raise InputError(f"the class folder {folder} holds no image, and would widen the mask: remove it")
        names += [str(path.relative_to(root)) for path in files]
        labels += [position[index]] * len(files)
    warn_of_left_out(root, sorted(left_out))
    source = ImageFiles(root, [class_names[index] for index in classes], labels, names)
    return RelatedSet(name or root.name, ClassificationDataset(source, transform), classes)


def open_pretraining_set(
    root: Path, num_classes: int, transform: v2.Transform
) -> tuple[ClassificationDataset, RelatedSet]:
    """The training images of ``root/train``, and ``root/val`` as the set called PRETRAINING, with all classes.

    Raises:
        InputError: a part is missing, or has other classes than the network's.
    """
    train, val = (open_dataset(root / part, transform) for part in ("train", "val"))
    if train.classes != val.classes:
        raise InputError(f"train and val of {root} have other classes: give the data that the backbone was trained on")
    if len(val.classes) != num_classes:
        raise InputError(
            f"{root} has {plural(len(val.classes), 'class')}, but the backbone knows {num_classes}: give the data that "
            "it was trained on"
        )
    return train, RelatedSet(PRETRAINING, val, tuple(range(num_classes)))


def _class_folders(folder: Path, known: dict[str, int], parts: int) -> list[tuple[int, Path]]:
    """Index and folder of every class below ``folder``, in the order of names."""
    inside = [path for path in visible(folder) if path.is_dir()]
    if not inside:
        raise InputError(f"{folder} holds no class folders")
    numbered = not any(path.name in known for path in inside) and all(path.name.isdigit() for path in inside)
    if numbered and all(_holds_images(path) for path in inside):  # ImageNet-V2's; severities hold no images themselves
        known = {str(index): index for index in known.values()}
    unknown = [path for path in inside if path.name not in known]
    if not unknown:
        return sorted((known[path.name], path) for path in inside)
    if len(unknown) == len(inside) and parts and not any(_holds_images(path) for path in inside):
        return [pair for path in inside for pair in _class_folders(path, known, parts - 1)]
    some = ", ".join(path.name for path in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
    raise InputError(f"{folder} has folders that are no classes of the pre-training set ({some}): rename or remove")


def _holds_images(folder: Path) -> bool:
    return any(is_image(path.name) for path in visible(folder))


class DecodedImages(ClassificationDataset):
    """A data set whose transformed images are in memory; the transform must not be random."""

    in_memory = True

    def __init__(self, dataset: ClassificationDataset, pixels: Tensor) -> None:
        self.__dict__.update(dataset.__dict__)
        self._pixels = pixels  # (N, 3, H, W), uint8
        self._rows: Sequence[int] = range(len(dataset))

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self._pixels[self._rows[position]], self.labels[position]

    def take(self, positions: Sequence[int]) -> DecodedImages:
        part = cast(DecodedImages, super().take(positions))
        part._rows = [self._rows[position] for position in positions]
        return part


@dataclass
class Memory:
    """Decodes each image once and keeps it while there is room; the others are decoded at every use."""

    gigabytes: float
    workers: int
    """Processes that decode."""
    used: int = 0
    """Bytes."""

    def keep(self, images: ClassificationDataset, description: str) -> ClassificationDataset:
        """``images`` with their pixels in memory, or unchanged if they do not fit or already are in memory."""
        if images.in_memory or not len(images):
            return images
        size = len(images) * images[0][0].numel()
        if self.used + size > self.gigabytes * 1e9:
            return images
        self.used += size
        batches = val_batches(images, 64, workers=self.workers)
        bar = tqdm(batches, desc=f"decoding {description}", unit="batch", disable=None, leave=False)
        return DecodedImages(images, torch.cat([pixels for pixels, _ in bar]))
