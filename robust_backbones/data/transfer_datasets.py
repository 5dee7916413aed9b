"""The twelve classification transfer data sets of Salman et al. 2020 as one table, and folders of one's own."""

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
from torchvision.transforms import v2

from robust_backbones.data.datasets import ClassificationDataset, ImageSource, open_dataset
from robust_backbones.data.folders import FolderImages
from robust_backbones.errors import InputError

SPLIT_SEED = 0
"""Draws the training images of the Caltech sets, which have no official split: every run shares one split."""

Sources = tuple[ImageSource, ImageSource]
Opener = Callable[[Path], Sources]


@dataclass(frozen=True)
class TransferDataset:
    """One row: what a data set must hold, how it is measured and how torchvision lays it out."""

    name: str
    """What command lines say, and the folder under the data root that may hold train/ and test/."""
    title: str
    num_classes: int
    train_images: int
    test_images: int
    metric: str
    """One of ``metrics.METRICS``."""
    split: str
    """What train and test are."""
    source: str
    """Where to get it."""
    layout: tuple[str, ...]
    """Paths under the data root without which torchvision's layout is not there."""
    open: Opener | None
    """Train and test part of torchvision's layout under a data root; None where torchvision has no such set."""


@dataclass(frozen=True)
class TransferData:
    """An opened data set; train and test have the same classes, each with an image in both."""

    name: str
    metric: str
    train: ClassificationDataset
    test: ClassificationDataset


@dataclass(frozen=True)
class Presence:
    """Whether a data set of the table is there."""

    dataset: TransferDataset
    state: str
    """One of "present", "missing", "differs" (its counts are not the table's) and "unusable"."""
    detail: str
    """The folder of a data set that is present, else what is wrong and how to mend it."""


class MissingDataError(InputError):
    """A data set of the table is not under the data root."""


class DifferentDataError(InputError):
    """What is under the name of a data set has other counts than the table."""


def open_transfer_data(
    dataset: str, data_root: Path | None, transform: v2.Transform, *, metric: str = "", seed: int = 0
) -> TransferData:
    """A data set of the table, or a folder of one's own.

    Args:
        dataset: a name of the table, or the path of a folder with train/ and test/ (without it, val/), each as
            ``open_dataset`` takes it.
        data_root: holds the data sets of the table: NAME/train and NAME/test as in a folder of one's own or, where
            there is no NAME/train, torchvision's layout.
        transform: of both parts.
        metric: of a folder of one's own, "top1" if not given; the table's data sets have theirs.
        seed: of the augmentation; splits do not depend on it.

    Raises:
        MissingDataError, DifferentDataError: see there.
        InputError: no such data set or metric; its files cannot be used; a class lacks images in train or test.
    """
    if row := TRANSFER_DATASETS.get(dataset):
        if metric not in ("", row.metric):
            raise InputError(
                f"{row.title} is measured by {row.metric}, not {metric}: leave the metric out, or give the data set by "
                "its path, as a folder of your own"
            )
        if data_root is None:
            raise InputError(f"{dataset} is looked up in the folder of all data sets: say where that is (--data-root)")
        return TransferData(row.name, row.metric, *_open_row(row, data_root, transform, seed))
    root = Path(dataset)
    if not root.is_dir():
        raise InputError(
            f"no data set or folder {dataset}: choose one of {', '.join(TRANSFER_DATASETS)}, or give the path of a "
            "folder that holds train/ and test/"
        )
    known = sorted({row.metric for row in TRANSFER_DATASETS.values()})
    if metric not in ("", *known):
        raise InputError(f"unknown metric {metric!r}: choose one of {', '.join(known)}")
    train, test = _open_folders(root, transform, seed)
    _check_classes(root, train, test)
    return TransferData(root.resolve().name, metric or "top1", train, test)


def check(row: TransferDataset, data_root: Path) -> Presence:
    """Whether a data set of the table is there as the table has it; no image is decoded."""
    try:
        _open_row(row, data_root, v2.Identity(), seed=0)
    except InputError as error:
        states: dict[type, str] = {MissingDataError: "missing", DifferentDataError: "differs"}
        return Presence(row, states.get(type(error), "unusable"), str(error))
    return Presence(row, "present", str(_place(row, data_root)))


def _place(row: TransferDataset, data_root: Path) -> Path:
    """The folder of the data set: one's own if it is there, else torchvision's."""
    own = data_root / row.name
    return own if (own / "train").is_dir() or not row.layout else data_root / Path(row.layout[0]).parts[0]


def _open_row(
    row: TransferDataset, data_root: Path, transform: v2.Transform, seed: int
) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Train and test part; raises as ``open_transfer_data``."""
    place = _place(row, data_root)
    if (data_root / row.name / "train").is_dir():
        train, test = _open_folders(place, transform, seed)
    else:
        sources = _open_official(row, data_root)
        train, test = (ClassificationDataset(source, transform, seed=seed) for source in sources)
    counts = (
        ("classes", len({*train.classes, *test.classes}), row.num_classes),
        ("training images", len(train), row.train_images),
        ("test images", len(test), row.test_images),
    )
    if wrong := [f"{found:,} {what} instead of {due:,}" for what, found, due in counts if found != due]:
        raise DifferentDataError(
            f"{place} is not {row.title}, it has {', '.join(wrong)}: complete it, or give a subset by its path, as a "
            "folder of your own"
        )
    _check_classes(place, train, test)
    return train, test


def _open_folders(
    root: Path, transform: v2.Transform, seed: int
) -> tuple[ClassificationDataset, ClassificationDataset]:
    test = root / ("val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test")
    for part in (root / "train", test):
        if not part.is_dir():
            raise InputError(f"no folder {part}: a data set's folder holds train/ and test/ (or val/)")
    return open_dataset(root / "train", transform, seed=seed), open_dataset(test, transform, seed=seed)


def _open_official(row: TransferDataset, data_root: Path) -> Sources:
    absent = [path for path in row.layout if not (data_root / path).exists()]
    if row.open is None or absent:
        own = f"one folder of images a class in {row.name}/train and {row.name}/test"
        wanted = f"{', '.join(row.layout)} (or else {own})" if row.layout else own
        which = f" ({absent[0]} is missing)" if absent else ""
        raise MissingDataError(
            f"{row.title} is not in {data_root}{which}: get it from {row.source} and put it there as {wanted}"
        )
    try:
        train, test = row.open(data_root)
        if shared := set(train.names) & set(test.names):
            raise ValueError(f"{min(shared)} is in both train and test")
    except InputError:
        raise
    except Exception as error:  # on lists that are incomplete or damaged torchvision raises nearly every type there is
        if isinstance(error, ImportError) or "Scipy is not found" in str(error):
            raise InputError(
                f"the lists of {row.title} are read by scipy, which is missing: pip install scipy"
            ) from None
        place = _place(row, data_root)
        raise InputError(f"cannot use {place} ({_reason(error)}): get {row.title} anew from {row.source}") from None
    return train, test


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    text = str(error).split(". ")[0]  # the second sentence of torchvision's errors is about its download
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else " ".join(text.split())


def _check_classes(place: Path, train: ClassificationDataset, test: ClassificationDataset) -> None:
    parts = (("train", train), ("test", test))
    for part, data in parts:
        labels = set(data.labels)
        filled = {name for label, name in enumerate(data.classes) if label in labels}
        for name in (*train.classes, *test.classes):
            if name not in filled:
                raise InputError(f"class {name} of {place} has no image in its {part} part: add some, or remove it")
    if train.classes != test.classes:
        raise InputError(f"train and test of {place} number the classes differently: give both the same classes.txt")


@dataclass(frozen=True)
class ArrayImages:
    """Images that a data set keeps as one array; each is read as a BMP file, which loses nothing."""

    root: Path
    classes: list[str]
    labels: list[int]
    names: list[str]
    """As paths relative to ``root``, though there are no such files."""
    pixels: NDArray[np.uint8]
    """Shape (N, H, W, 3), RGB."""

    def read(self, index: int) -> bytes:
        _, encoded = cv2.imencode(".bmp", self.pixels[index][:, :, ::-1])  # OpenCV takes BGR
        return encoded.tobytes()

    def stamp(self, index: int) -> tuple[int, ...]:
        return (zlib.crc32(self.pixels[index].tobytes()),)


def _cifar(dataset: Callable[..., Any], folder: str) -> Opener:
    def source(root: Path, part: str) -> ArrayImages:
        data = dataset(root, train=part == "train")
        names = [f"{folder}/{part}/{index:05d}" for index in range(len(data.targets))]
        return ArrayImages(root, data.classes, data.targets, names, data.data)

    return lambda root: (source(root, "train"), source(root, "test"))


def _files_and_labels(data: Any) -> Iterable[tuple[str | Path, int]]:
    return zip(data._image_files, data._labels, strict=True)


def _listed(
    dataset: Callable[..., Any],
    train: Sequence[str],
    items: Callable[[Any], Iterable[tuple[str | Path, int]]] = _files_and_labels,
) -> Opener:
    """Opener of a set of which torchvision lists the files of each split.

    Args:
        train: splits that together are the training part; the other part is the split "test".
        items: path and label of each image, from torchvision's data set.
    """

    def source(root: Path, splits: Sequence[str]) -> FolderImages:
        parts = [dataset(root, split=split) for split in splits]
        pairs = [pair for part in parts for pair in items(part)]
        labels = [int(label) for _, label in pairs]
        # torchvision 0.21 does not name the flowers.
        classes = getattr(parts[0], "classes", None) or [str(label) for label in range(max(labels, default=-1) + 1)]
        if any(getattr(part, "classes", classes) != classes for part in parts):
            raise ValueError(f"the lists {' and '.join(splits)} have different classes")
        return FolderImages(root, list(classes), labels, [os.path.relpath(path, root) for path, _ in pairs])

    return lambda root: (source(root, train), source(root, ["test"]))


def _drawn(dataset: Callable[..., Any], file: str, train_images: int) -> Opener:
    """Opener of a Caltech set: ``train_images`` of each class, drawn by SPLIT_SEED, and the rest.

    Args:
        file: an image's path under the data root, from the class's name and number and the image's index.
    """

    def sources(root: Path) -> Sources:
        data = dataset(root)
        classes: list[str] = data.categories
        indices: dict[int, list[int]] = defaultdict(list)
        for label, index in zip(data.y, data.index, strict=True):
            indices[label].append(index)
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        train, test = parts = FolderImages(root, classes, [], []), FolderImages(root, classes, [], [])
        for label, name in enumerate(classes):
            total = len(indices[label])
            if total <= train_images:
                raise InputError(
                    f"class {name} of {root / Path(file).parts[0]} has {total} images, {train_images} to train and one "
                    "to test are the least: unpack it again"
                )
            drawn = set(torch.randperm(total, generator=generator)[:train_images].tolist())
            for position, index in enumerate(indices[label]):
                part = parts[position not in drawn]
                part.labels.append(label)
                part.names.append(file.format(name=name, number=label + 1, index=index))
        return train, test

    return sources


def _sun397(root: Path) -> Sources:
    """The first of ten official partitions, from its own files: torchvision has no split."""
    folder = root / "SUN397"

    def lines(file: str) -> list[str]:
        return [line.strip() for line in (folder / file).read_text().splitlines() if line.strip()]

    classes = [line[3:] for line in lines("ClassName.txt")]  # /a/abbey
    numbers = {name: number for number, name in enumerate(classes)}

    def source(file: str) -> FolderImages:
        names = lines(file)  # /a/abbey/sun_aaa.jpg, /a/apse/indoor/sun_bbb.jpg
        return FolderImages(
            root, classes, [numbers[name[3:].rpartition("/")[0]] for name in names], [f"SUN397{name}" for name in names]
        )

    return source("Training_01.txt"), source("Testing_01.txt")


TRANSFER_DATASETS = {
    row.name: row
    for row in (
        TransferDataset(
            name="aircraft",
            title="FGVC Aircraft",
            num_classes=100,
            train_images=6_667,
            test_images=3_333,
            metric="mean_per_class",
            split="official trainval / test; classes are the variants",
            source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ or by torchvision.datasets.FGVCAircraft",
            layout=("fgvc-aircraft-2013b/data",),
            open=_listed(datasets.FGVCAircraft, ["trainval"]),
        ),
        TransferDataset(
            name="birdsnap",
            title="Birdsnap",
            num_classes=500,
            train_images=32_677,
            test_images=8_171,
            metric="top1",
            split="four fifths / one fifth of 40,848 images, by the folders given",
            source="https://thomasberg.org/ (version 1.1 lists where each photograph was; torchvision has no such set)",
            layout=(),
            open=None,
        ),
        TransferDataset(
            name="caltech101",
            title="Caltech-101",
            num_classes=101,
            train_images=3_030,
            test_images=5_647,
            metric="mean_per_class",
            split="30 images a class, drawn with a fixed seed, / the rest; without BACKGROUND_Google",
            source="https://data.caltech.edu/records/mzrjq-6wc02 or by torchvision.datasets.Caltech101",
            # torchvision fails without the class that it leaves out.
            layout=("caltech101/101_ObjectCategories", "caltech101/101_ObjectCategories/BACKGROUND_Google"),
            open=_drawn(
                datasets.Caltech101, "caltech101/101_ObjectCategories/{name}/image_{index:04d}.jpg", train_images=30
            ),
        ),
        TransferDataset(
            name="caltech256",
            title="Caltech-256",
            num_classes=257,
            train_images=15_420,
            test_images=15_187,
            metric="mean_per_class",
            split="60 images a class, drawn with a fixed seed, / the rest; with 257.clutter",
            source="https://data.caltech.edu/records/nyy15-4j048 or by torchvision.datasets.Caltech256",
            layout=("caltech256/256_ObjectCategories",),
            open=_drawn(
                datasets.Caltech256,
                "caltech256/256_ObjectCategories/{name}/{number:03d}_{index:04d}.jpg",
                train_images=60,
            ),
        ),
        TransferDataset(
            name="cars",
            title="Stanford Cars",
            num_classes=196,
            train_images=8_144,
            test_images=8_041,
            metric="top1",
            split="official train / test",
            source="a copy of https://ai.stanford.edu/~jkrause/cars/car_dataset.html (that page is gone, and "
            "torchvision no longer downloads it)",
            layout=(
                "stanford_cars/cars_train",
                "stanford_cars/cars_test",
                "stanford_cars/devkit",
                "stanford_cars/cars_test_annos_withlabels.mat",
            ),
            open=_listed(datasets.StanfordCars, ["train"], lambda data: data._samples),
        ),
        TransferDataset(
            name="cifar10",
            title="CIFAR-10",
            num_classes=10,
            train_images=50_000,
            test_images=10_000,
            metric="top1",
            split="official train / test",
            source="https://www.cs.toronto.edu/~kriz/cifar.html or by torchvision.datasets.CIFAR10",
            layout=("cifar-10-batches-py",),
            open=_cifar(datasets.CIFAR10, "cifar-10-batches-py"),
        ),
        TransferDataset(
            name="cifar100",
            title="CIFAR-100",
            num_classes=100,
            train_images=50_000,
            test_images=10_000,
            metric="top1",
            split="official train / test; the fine classes",
            source="https://www.cs.toronto.edu/~kriz/cifar.html or by torchvision.datasets.CIFAR100",
            layout=("cifar-100-python",),
            open=_cifar(datasets.CIFAR100, "cifar-100-python"),
        ),
        TransferDataset(
            name="dtd",
            title="DTD",
            num_classes=47,
            train_images=3_760,
            test_images=1_880,
            metric="top1",
            split="official train and val / test of the first of ten partitions",
            source="https://www.robots.ox.ac.uk/~vgg/data/dtd/ or by torchvision.datasets.DTD",
            layout=("dtd/dtd/images", "dtd/dtd/labels"),
            open=_listed(datasets.DTD, ["train", "val"]),
        ),
        TransferDataset(
            name="flowers",
            title="Oxford 102 Flowers",
            num_classes=102,
            train_images=2_040,
            test_images=6_149,
            metric="mean_per_class",
            split="official train and val (10 images a class each) / test",
            source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ or by torchvision.datasets.Flowers102",
            layout=("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
            open=_listed(datasets.Flowers102, ["train", "val"]),
        ),
        TransferDataset(
            name="food",
            title="Food-101",
            num_classes=101,
            train_images=75_750,
            test_images=25_250,
            metric="top1",
            split="official train / test",
            source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ or by torchvision.datasets.Food101",
            layout=("food-101/images", "food-101/meta"),
            open=_listed(datasets.Food101, ["train"]),
        ),
        TransferDataset(
            name="pets",
            title="Oxford-IIIT Pets",
            num_classes=37,
            train_images=3_680,
            test_images=3_669,
            metric="mean_per_class",
            split="official trainval / test",
            source="https://www.robots.ox.ac.uk/~vgg/data/pets/ or by torchvision.datasets.OxfordIIITPet",
            layout=("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
            open=_listed(
                datasets.OxfordIIITPet, ["trainval"], lambda data: zip(data._images, data._labels, strict=True)
            ),
        ),
        TransferDataset(
            name="sun397",
            title="SUN397",
            num_classes=397,
            train_images=19_850,
            test_images=19_850,
            metric="top1",
            split="the first of ten official partitions, 50 images a class each",
            source="https://vision.princeton.edu/projects/2010/SUN/ (images also by torchvision.datasets.SUN397, the "
            "split from download/Partitions.zip there)",
            layout=("SUN397/ClassName.txt", "SUN397/Training_01.txt", "SUN397/Testing_01.txt"),
            open=_sun397,
        ),
    )
}
