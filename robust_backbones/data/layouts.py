"""The images of transfer data sets in torchvision's layout, with its lists of classes and splits."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import datasets

from robust_backbones.data.images import ImageFiles
from robust_backbones.errors import InputError, plural

SPLIT_SEED = 0
"""Draws the training images of the Caltech sets, which have no official split: every run shares one split."""
SPLITS = ("drawn", "first")
"""For the Caltech sets: training images drawn by SPLIT_SEED, or the first of each class, as in the public code."""

Sources = tuple[ImageFiles, ImageFiles]
Opener = Callable[[Path], Sources]


@dataclass(frozen=True)
class ArrayImages(ImageFiles):
    """Images that a data set stores as one array; each is read as a BMP file, which is lossless."""

    pixels: NDArray[np.uint8]
    """Shape (N, H, W, 3), RGB."""

    def read(self, index: int) -> bytes:
        _, encoded = cv2.imencode(".bmp", self.pixels[index][:, :, ::-1])  # OpenCV takes BGR
        return encoded.tobytes()

    def stamp(self, index: int) -> tuple[int, ...]:
        return (zlib.crc32(self.pixels[index].tobytes()),)


def _cifar(dataset: type[Any], folder: str) -> Opener:
    def source(root: Path, part: str) -> ArrayImages:
        data = dataset(root, train=part == "train")
        names = [f"{folder}/{part}/{index:05d}" for index in range(len(data.targets))]
        return ArrayImages(root, data.classes, data.targets, names, data.data)

    return lambda root: (source(root, "train"), source(root, "test"))


def _files_and_labels(data: Any) -> Iterable[tuple[str | Path, int]]:
    return zip(data._image_files, data._labels, strict=True)


def _listed(
    dataset: type[Any],
    train: Sequence[str],
    items: Callable[[Any], Iterable[tuple[str | Path, int]]] = _files_and_labels,
) -> Opener:
    """Opener of a set for which torchvision lists the files of each split: those of ``train`` together, and "test"."""

    def source(root: Path, splits: Sequence[str]) -> ImageFiles:
        parts = [dataset(root, split=split) for split in splits]
        pairs = [pair for part in parts for pair in items(part)]
        labels = [int(label) for _, label in pairs]
        # torchvision 0.21 does not name the flowers.
        classes = getattr(parts[0], "classes", None) or [str(label) for label in range(max(labels, default=-1) + 1)]
        if any(getattr(part, "classes", classes) != classes for part in parts):
            raise ValueError(f"the lists {' and '.join(splits)} have different classes")
        return ImageFiles(root, list(classes), labels, [os.path.relpath(path, root) for path, _ in pairs])

    return lambda root: (source(root, train), source(root, ["test"]))


def _split(dataset: type[Any], file: str, train_images: int, split: str) -> Opener:
    """Opener of a Caltech set, whose images are each a ``file``: some of each class, by ``split``, and the rest."""

    def sources(root: Path) -> Sources:
        data = dataset(root)
        classes: list[str] = data.categories
        indices: dict[int, list[int]] = defaultdict(list)
        for label, index in zip(data.y, data.index, strict=True):
            indices[label].append(index)
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        train, test = parts = ImageFiles(root, classes, [], []), ImageFiles(root, classes, [], [])
        for label, name in enumerate(classes):
            total = len(indices[label])
            if total <= train_images:
                raise InputError(
                    f"class {name} of {root / Path(file).parts[0]} has {plural(total, 'image')}, {train_images} to "
                    "train and one to test are the least: unpack it again"
                )
            order = torch.randperm(total, generator=generator).tolist() if split == "drawn" else range(total)
            drawn = set(order[:train_images])
            for position, index in enumerate(indices[label]):
                part = parts[position not in drawn]
                part.labels.append(label)
                part.names.append(file.format(name=name, number=label + 1, index=index))
        return train, test

    return sources


def _sun397(root: Path) -> Sources:
    """The first of ten official partitions, from its own files, because torchvision has no split."""
    folder = root / "SUN397"

    def lines(file: str) -> list[str]:
        return [line.strip() for line in (folder / file).read_text().splitlines() if line.strip()]

    classes = [line[3:] for line in lines("ClassName.txt")]  # /a/abbey
    numbers = {name: number for number, name in enumerate(classes)}

    def source(file: str) -> ImageFiles:
        names = lines(file)  # /a/abbey/sun_aaa.jpg, /a/apse/indoor/sun_bbb.jpg
        return ImageFiles(
            root, classes, [numbers[name[3:].rpartition("/")[0]] for name in names], [f"SUN397{name}" for name in names]
        )

    return source("Training_01.txt"), source("Testing_01.txt")


CALTECH: dict[str, dict[str, Opener]] = {
    split: {
        "caltech101": _split(
            datasets.Caltech101, "caltech101/101_ObjectCategories/{name}/image_{index:04d}.jpg", 30, split
        ),
        "caltech256": _split(
            datasets.Caltech256, "caltech256/256_ObjectCategories/{name}/{number:03d}_{index:04d}.jpg", 60, split
        ),
    }
    for split in SPLITS
}
"""Split -> name -> train and test parts."""
LAYOUTS: dict[str, Opener] = {
    "aircraft": _listed(datasets.FGVCAircraft, ["trainval"]),
    **CALTECH["drawn"],
    "cars": _listed(datasets.StanfordCars, ["train"], lambda data: data._samples),
    "cifar10": _cifar(datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": _cifar(datasets.CIFAR100, "cifar-100-python"),
    "dtd": _listed(datasets.DTD, ["train", "val"]),
    "flowers": _listed(datasets.Flowers102, ["train", "val"]),
    "food": _listed(datasets.Food101, ["train"]),
    "pets": _listed(datasets.OxfordIIITPet, ["trainval"], lambda data: zip(data._images, data._labels, strict=True)),
    "sun397": _sun397,
}
"""Name of a data set -> train and test parts in torchvision's layout under a data root; it has no Birdsnap."""
