"""The twelve classification transfer data sets of Salman et al. 2020 as one table, and custom folders."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from robust_backbones.data.datasets import ClassificationDataset, check_several, open_dataset
from robust_backbones.data.layouts import CALTECH, LAYOUTS, SPLITS, Sources
from robust_backbones.errors import InputError, check_choice, plural


@dataclass(frozen=True)
class TransferDataset:
    """A row of transfer_datasets.csv: the content of a data set, its metric, and its place in torchvision."""

    name: str
    """Name on command lines, and the folder under the data root that may have train/ and test/."""
    title: str
    num_classes: int
    train_images: int
    test_images: int
    metric: str
    """One of ``metrics.METRICS``."""
    split: str
    """The definition of train and test."""
    source: str
    """Where to get it."""
    layout: tuple[str, ...]
    """Paths under the data root that torchvision's layout must have; empty if torchvision has no such set."""


@dataclass(frozen=True)
class TransferData:
    """An opened data set; train and test have the same classes, each with an image in both."""

    name: str
    """Name in records: of the table, or of a custom folder, preceded by ``own_`` if the table has it too."""
    metric: str
    train: ClassificationDataset
    test: ClassificationDataset


class MissingDataError(InputError):
    """A data set of the table is not under the data root."""


class DifferentDataError(InputError):
    """The files under the name of a data set have other counts than the table."""


def open_transfer_data(
    dataset: str | Path,
    data_root: str | Path | None,
    *,
    metric: str = "",
    split: str = "drawn",
) -> TransferData:
    """Open a data set of the table, or a custom folder, without a transform of its images.

    Args:
        dataset: a name of the table, or the path of a folder with train/ and test/ (or val/), each for
            ``open_dataset``.
        data_root: folder of the table's data sets: NAME/train and NAME/test as in a custom folder or, without
            NAME/train, torchvision's layout.
        metric: for a custom folder, default "top1"; the table's data sets have their own.
        split: for the Caltech sets, one of SPLITS; ``first`` needs torchvision's layout.

    Raises:
        MissingDataError, DifferentDataError: see there.
        InputError: no such data set or metric; its files cannot be used; a class lacks images in train or test.
    """
    check_choice("split", split, SPLITS)
    if split != SPLITS[0] and str(dataset) not in CALTECH[split]:
        raise InputError(f"--split {split} is for {' and '.join(CALTECH[split])}, not for {dataset}: leave it out")
    if row := TRANSFER_DATASETS.get(str(dataset)):
        if metric not in ("", row.metric):
            raise InputError(
                f"{row.title} is measured by {row.metric}, not {metric}: leave the metric out, or give the data set by "
                "its path, as a folder of your own"
            )
        if data_root is None:
            raise InputError(f"{dataset} is looked up in the folder of all data sets: say where that is (--data-root)")
        name = row.name if split == SPLITS[0] else f"{row.name}_{split}"
        return TransferData(name, row.metric, *_open_row(row, Path(data_root), split))
    root = Path(dataset)
    if not root.is_dir():
        raise InputError(
            f"no data set or folder {dataset}: choose one of {', '.join(TRANSFER_DATASETS)}, or give the path of a "
            "folder that holds train/ and test/"
        )
    metric = metric or "top1"
    check_choice("metric", metric, sorted({row.metric for row in TRANSFER_DATASETS.values()}))
    train, test = _open_folders(root)
    _check_classes(root, train, test)
    name = root.resolve().name
    official = TRANSFER_DATASETS.get(name.removesuffix(f"_{SPLITS[1]}"))
    if official and (name != official.name or metric != official.metric or _unlike(official, train, test)):
        name = f"own_{name}"  # else tables put the paper's numbers beside it
    return TransferData(name, metric, train, test)


def check(row: TransferDataset, data_root: Path) -> tuple[str, str]:
    """Check whether a data set of the table exists and matches the table; no image is decoded.

    Returns:
        "present" and its folder; else "missing", "differs" (its counts are not the table's) or "unusable", and what is
        wrong and how to fix it.
    """
    try:
        _open_row(row, data_root)
    except InputError as error:
        states: dict[type, str] = {MissingDataError: "missing", DifferentDataError: "differs"}
        return states.get(type(error), "unusable"), str(error)
    return "present", str(_place(row, data_root))


def _place(row: TransferDataset, data_root: Path) -> Path:
    """The folder of the data set: the custom one if it exists, else torchvision's."""
    own = data_root / row.name
    return own if (own / "train").is_dir() or not row.layout else data_root / Path(row.layout[0]).parts[0]


def _open_row(
    row: TransferDataset, data_root: Path, split: str = SPLITS[0]
) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Train and test parts; raises like ``open_transfer_data``."""
    place = _place(row, data_root)
    if (data_root / row.name / "train").is_dir():
        if split != SPLITS[0]:
            raise InputError(f"{place}/train and /test are a split already: leave --split {split} out, or remove them")
        train, test = _open_folders(place)
    else:
        sources = _open_official(row, data_root, split)
        train, test = (ClassificationDataset(source, v2.Identity()) for source in sources)
    if wrong := _unlike(row, train, test):
        raise DifferentDataError(
            f"{place} is not {row.title}, it has {', '.join(wrong)}: complete it, or give a subset by its path, as a "
            "folder of your own"
        )
    _check_classes(place, train, test)
    return train, test


def _unlike(row: TransferDataset, train: ClassificationDataset, test: ClassificationDataset) -> list[str]:
    """How a data set's counts differ from those of the table."""
    counts = (
        ("class", len({*train.classes, *test.classes}), row.num_classes),
        ("training image", len(train), row.train_images),
        ("test image", len(test), row.test_images),
    )
    return [f"{plural(found, what)} instead of {due:,}" for what, found, due in counts if found != due]


def _open_folders(root: Path) -> tuple[ClassificationDataset, ClassificationDataset]:
    test = root / ("val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test")
    for part in (root / "train", test):
        if not part.is_dir():
            raise InputError(f"no folder {part}: a data set's folder holds train/ and test/ (or val/)")
    return open_dataset(root / "train", v2.Identity()), open_dataset(test, v2.Identity())


def _open_official(row: TransferDataset, data_root: Path, split: str) -> Sources:
    absent = [path for path in row.layout if not (data_root / path).exists()]
    if absent or not row.layout:
        own = f"one folder of images a class in {row.name}/train and {row.name}/test"
        wanted = f"{', '.join(row.layout)} (or else {own})" if row.layout else own
        which = f" ({absent[0]} is missing)" if absent else ""
        raise MissingDataError(
            f"{row.title} is not in {data_root}{which}: get it from {row.source} and put it there as {wanted}"
        )
    try:
        train, test = CALTECH[split].get(row.name, LAYOUTS[row.name])(data_root)
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
    for part, data in (("train", train), ("test", test)):
        labels = set(data.labels)
        filled = {name for label, name in enumerate(data.classes) if label in labels}
        for name in (*train.classes, *test.classes):
            if name not in filled:
                raise InputError(f"class {name} of {place} has no image in its {part} part: add some, or remove it")
    if train.classes != test.classes:
        raise InputError(f"train and test of {place} number the classes differently: give both the same classes.txt")
    check_several(train.classes, place / "train")


def _read_table() -> dict[str, TransferDataset]:
    with open(Path(__file__).with_suffix(".csv"), newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: int(row[name]) for name in ("num_classes", "train_images", "test_images")}
        row["layout"] = tuple(row["layout"].split())
    return {row["name"]: TransferDataset(**row) for row in rows}


TRANSFER_DATASETS = _read_table()
