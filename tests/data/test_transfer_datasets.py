"""The transfer data sets: torchvision's layouts re-created small, against its own reading of them; and one's own."""

import json
import pickle
import re
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.transforms import v2

from robust_backbones.classification.metrics import METRICS
from robust_backbones.data.datasets import ClassificationDataset, find_unreadable, open_dataset
from robust_backbones.data.decoding import ImageInputError, ResizedCache
from robust_backbones.data.transfer_datasets import (
    TRANSFER_DATASETS,
    DifferentDataError,
    MissingDataError,
    TransferData,
    check,
    open_transfer_data,
)
from robust_backbones.errors import InputError

PIXELS = v2.Identity()
Item = tuple[tuple[int, ...], bytes, int, str]
"""Shape and pixels of an image, its label and class."""


def paint(path: Path) -> None:
    """A small picture unlike any of another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
    assert cv2.imwrite(str(path), rng.integers(0, 256, (*rng.integers(6, 12, 2), 3), dtype=np.uint8))


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_aircraft(root: Path, patch: pytest.MonkeyPatch) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    classes = ("707-320", "Hawk T1", "A340-300")  # neither sorted nor without a space
    write(data / "variants.txt", classes)
    numbers = count(1_000_000)
    for split, per_class in (("trainval", 2), ("test", 1)):
        images = [(next(numbers), name) for _ in range(per_class) for name in classes]
        write(data / f"images_variant_{split}.txt", (f"{number} {name}" for number, name in images))
        for number, _ in images:
            paint(data / f"images/{number}.jpg")


def write_caltech101(root: Path, patch: pytest.MonkeyPatch) -> None:
    for name, images in (("wrench", 31), ("Faces", 33), ("accordion", 32), ("BACKGROUND_Google", 2)):
        for index in range(1, images + 1):
            paint(root / f"caltech101/101_ObjectCategories/{name}/image_{index:04d}.jpg")


def write_caltech256(root: Path, patch: pytest.MonkeyPatch) -> None:
    for number, (name, images) in enumerate((("001.ak47", 62), ("002.spider", 61), ("003.clutter", 64)), 1):
        for index in range(1, images + 1):
            paint(root / f"caltech256/256_ObjectCategories/{name}/{number:03d}_{index:04d}.jpg")
    (root / "caltech256/256_ObjectCategories/002.spider/RENAME2").touch()  # a slip of the real archive


def write_cars(root: Path, patch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    cars = root / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    classes = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"]
    savemat(cars / "devkit/cars_meta.mat", {"class_names": np.array(classes, object)})
    for part, labels, file in (
        ("cars_train", (3, 1, 2, 2), "devkit/cars_train_annos.mat"),
        ("cars_test", (1, 2, 3), "cars_test_annos_withlabels.mat"),
    ):
        rows = [(7, np.uint8(label), f"{index:05d}.jpg") for index, label in enumerate(labels, 1)]
        fields = [("bbox_x1", object), ("class", object), ("fname", object)]
        savemat(cars / file, {"annotations": np.array(rows, fields)})
        for _, _, name in rows:
            paint(cars / part / name)


def write_cifar(dataset: Any, files: dict[str, int], labels: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """``files``: images of each; the last is the test part."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: ["cat", "ship", "apple"]}))
    rng = np.random.default_rng(len(files))
    for name, images in files.items():
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, labels: [(2 + i) % 3 for i in range(images)]}))
    unchecked = [[name, None] for name in files]  # the real files have checksums
    for attribute, value in (
        ("train_list", unchecked[:-1]),
        ("test_list", unchecked[-1:]),
        ("meta", {**dataset.meta, "md5": None}),
    ):
        patch.setattr(dataset, attribute, value)


def write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    files = {f"data_batch_{number}": 3 for number in range(1, 6)} | {"test_batch": 4}
    write_cifar(datasets.CIFAR10, files, "labels", root, patch)


def write_cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    write_cifar(datasets.CIFAR100, {"train": 6, "test": 3}, "fine_labels", root, patch)


def write_dtd(root: Path, patch: pytest.MonkeyPatch) -> None:
    classes = [f"texture_{index:02d}" for index in range(47)]
    for number, split in enumerate(("train", "val", "test"), 1):
        names = [f"{name}/{name}_{number:04d}.jpg" for name in classes]
        write(root / f"dtd/dtd/labels/{split}1.txt", names)
        for name in names:
            paint(root / "dtd/dtd/images" / name)


def write_flowers(root: Path, patch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    flowers = root / "flowers-102"
    flowers.mkdir(parents=True)
    savemat(flowers / "imagelabels.mat", {"labels": np.array([3, 1, 2, 3, 1, 2, 1, 2, 3, 3], np.uint8)})
    savemat(flowers / "setid.mat", {"trnid": [3, 1, 2], "valid": [4, 5, 6], "tstid": [10, 7, 8, 9]})
    for number in range(1, 11):
        paint(flowers / f"jpg/image_{number:05d}.jpg")
    files = {key: (name, None) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    patch.setattr(datasets.Flowers102, "_file_dict", files)
    patch.setattr(datasets.Flowers102, "classes", ["pink primrose", "lotus", "colt's foot"], raising=False)


def write_food(root: Path, patch: pytest.MonkeyPatch) -> None:
    for split, numbers in (("train", (11, 12)), ("test", (13,))):
        names = {name: [f"{name}/{number}" for number in numbers] for name in ("waffles", "apple_pie", "miso_soup")}
        write(root / f"food-101/meta/{split}.json", [json.dumps(names)])
        for files in names.values():
            for file in files:
                paint(root / f"food-101/images/{file}.jpg")


def write_pets(root: Path, patch: pytest.MonkeyPatch) -> None:
    pets = root / "oxford-iiit-pet"
    breeds = (("Abyssinian", 1, 1), ("american_bulldog", 2, 2), ("yorkshire_terrier", 3, 2))
    for split, numbers in (("trainval", (1, 20)), ("test", (300,))):
        names = [(f"{breed}_{number}", label, kind) for number in numbers for breed, label, kind in breeds]
        write(pets / f"annotations/{split}.txt", (f"{name} {label} {kind} 1" for name, label, kind in names))
        for name, _, _ in names:
            paint(pets / f"images/{name}.jpg")


def write_sun397(root: Path, patch: pytest.MonkeyPatch) -> None:
    sun = root / "SUN397"
    classes = ("/a/abbey", "/a/apse/indoor", "/y/youth_hostel")
    write(sun / "ClassName.txt", classes)
    write(sun / "Training_01.txt", [f"{name}/sun_{letter}.jpg" for name in reversed(classes) for letter in "ab"])
    write(sun / "Testing_01.txt", [f"{name}/sun_c.jpg" for name in classes])
    for name in classes:
        for letter in "abcd":  # the last is in neither part
            paint(sun / f"{name[1:]}/sun_{letter}.jpg")


SMALL: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], int, int, int]] = {
    "aircraft": (write_aircraft, 3, 6, 3),
    "caltech101": (write_caltech101, 3, 90, 6),
    "caltech256": (write_caltech256, 3, 180, 7),
    "cars": (write_cars, 3, 4, 3),
    "cifar10": (write_cifar10, 3, 15, 4),
    "cifar100": (write_cifar100, 3, 6, 3),
    "dtd": (write_dtd, 47, 94, 47),
    "flowers": (write_flowers, 3, 6, 4),
    "food": (write_food, 3, 6, 3),
    "pets": (write_pets, 3, 6, 3),
    "sun397": (write_sun397, 3, 6, 3),
}
"""What writes torchvision's layout; classes, training and test images."""

THEIRS: dict[str, tuple[Any, list[dict[str, Any]], dict[str, Any]]] = {
    "aircraft": (datasets.FGVCAircraft, [{"split": "trainval"}], {"split": "test"}),
    "cars": (datasets.StanfordCars, [{"split": "train"}], {"split": "test"}),
    "cifar10": (datasets.CIFAR10, [{"train": True}], {"train": False}),
    "cifar100": (datasets.CIFAR100, [{"train": True}], {"train": False}),
    "dtd": (datasets.DTD, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "flowers": (datasets.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "food": (datasets.Food101, [{"split": "train"}], {"split": "test"}),
    "pets": (datasets.OxfordIIITPet, [{"split": "trainval"}], {"split": "test"}),
}
"""torchvision's data set, and the arguments of what is the training and the test part."""

WHOLE = {"caltech101": datasets.Caltech101, "caltech256": datasets.Caltech256, "sun397": datasets.SUN397}
"""Those of which torchvision knows no parts."""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Maker of a data root with a small data set in torchvision's layout, whose counts become those of the table."""

    def make(name: str) -> Path:
        writer, classes, train, test = SMALL[name]
        writer(tmp_path / "data", monkeypatch)
        row = replace(TRANSFER_DATASETS[name], num_classes=classes, train_images=train, test_images=test)
        monkeypatch.setitem(TRANSFER_DATASETS, name, row)
        return tmp_path / "data"

    return make


def open_pixels(name: str | Path, root: Path | None = None, **arguments: Any) -> TransferData:
    return open_transfer_data(str(name), root, **arguments)


def ours(data: ClassificationDataset) -> list[Item]:
    return [(tuple(image.shape), image.numpy().tobytes(), label, data.classes[label]) for image, label in data]


def theirs(data: Any) -> list[Item]:
    classes = data.categories if hasattr(data, "categories") else data.classes
    items = []
    for index in range(len(data)):
        image, label = data[index]
        pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
        items.append((tuple(pixels.shape), pixels.numpy().tobytes(), int(label), classes[label]))
    return items


def write_folders(root: Path, parts: dict[str, dict[str, int]]) -> Path:
    for part, classes in parts.items():
        for name, images in classes.items():
            for index in range(images):
                paint(root / part / name / f"{index}.png")
    return root


def test_the_table_has_the_sizes_and_metrics_of_the_paper() -> None:
    expected = {
        "aircraft": (100, 6667, 3333, "mean_per_class"),
        "birdsnap": (500, 32677, 8171, "top1"),
        "caltech101": (101, 3030, 5647, "mean_per_class"),
        "caltech256": (257, 15420, 15187, "mean_per_class"),
        "cars": (196, 8144, 8041, "top1"),
        "cifar10": (10, 50000, 10000, "top1"),
        "cifar100": (100, 50000, 10000, "top1"),
        "dtd": (47, 3760, 1880, "top1"),
        "flowers": (102, 2040, 6149, "mean_per_class"),
        "food": (101, 75750, 25250, "top1"),
        "pets": (37, 3680, 3669, "mean_per_class"),
        "sun397": (397, 19850, 19850, "top1"),
    }
    found = {
        name: (row.num_classes, row.train_images, row.test_images, row.metric)
        for name, row in TRANSFER_DATASETS.items()
    }
    assert found == expected
    assert list(found) == sorted(found)
    for name, row in TRANSFER_DATASETS.items():
        assert row.name == name
        assert row.metric in METRICS
        assert all(hasattr(datasets, word) for word in re.findall(r"torchvision\.datasets\.(\w+)", row.source))
    assert {name for name, row in TRANSFER_DATASETS.items() if row.layout} == set(SMALL) == set(THEIRS) | set(WHOLE)


@pytest.mark.parametrize("name", THEIRS)
def test_pixels_labels_and_class_names_of_both_parts_are_those_of_torchvision(
    small: Callable[[str], Path], name: str
) -> None:
    root = small(name)
    data = open_pixels(name, root)
    dataset, train, test = THEIRS[name]
    assert ours(data.train) == [item for arguments in train for item in theirs(dataset(root, **arguments))]
    assert ours(data.test) == theirs(dataset(root, **test))
    assert (data.name, data.metric) == (name, TRANSFER_DATASETS[name].metric)


@pytest.mark.parametrize("name", WHOLE)
def test_items_without_an_official_split_are_those_of_torchvision_too(small: Callable[[str], Path], name: str) -> None:
    root = small(name)
    data = open_pixels(name, root)
    items, expected = ours(data.train) + ours(data.test), theirs(WHOLE[name](root))
    assert data.train.classes == data.test.classes == list(dict.fromkeys(sorted(item[3] for item in expected)))
    if name == "sun397":
        assert len(items) == len(set(items)) == 9
        assert set(items) < set(expected)
    else:
        assert sorted(items) == sorted(expected)


@pytest.mark.parametrize("name", SMALL)
def test_no_image_is_in_both_parts_and_none_is_forgotten(small: Callable[[str], Path], name: str) -> None:
    root = small(name)
    data = open_pixels(name, root)
    train, test = ({item[:2] for item in ours(part)} for part in (data.train, data.test))
    _, _, train_images, test_images = SMALL[name]
    assert (len(train), len(test)) == (train_images, test_images)
    assert not train & test
    assert len({*data.train.names, *data.test.names}) == train_images + test_images
    if not name.startswith("cifar"):
        files = {str(path.relative_to(root)) for path in root.rglob("*.jpg")}
        left_out = {file for file in files if "BACKGROUND_Google" in file or file.endswith("sun_d.jpg")}
        assert {*data.train.names, *data.test.names} == files - left_out


@pytest.mark.parametrize("name", TRANSFER_DATASETS)
def test_every_data_set_may_lie_in_folders_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_folders(tmp_path / name, {"train": {"a": 2, "b": 1}, "val": {"a": 1, "b": 1}})
    row = replace(TRANSFER_DATASETS[name], num_classes=2, train_images=3, test_images=2)
    monkeypatch.setitem(TRANSFER_DATASETS, name, row)
    data = open_pixels(name, tmp_path)
    assert ours(data.train) == theirs(datasets.ImageFolder(tmp_path / name / "train"))
    assert ours(data.test) == theirs(datasets.ImageFolder(tmp_path / name / "val"))
    assert not {item[1] for item in ours(data.train)} & {item[1] for item in ours(data.test)}
    assert data.metric == row.metric
    assert check(row, tmp_path) == ("present", str(tmp_path / name))


def test_folders_of_the_name_come_before_the_layout_of_torchvision(small: Callable[[str], Path]) -> None:
    root = small("food")
    write_folders(root / "food", {"train": {"a": 2, "b": 2, "c": 2}, "test": {"a": 1, "b": 1, "c": 1}})
    assert open_pixels("food", root).train.classes == ["a", "b", "c"]
    shutil.rmtree(root / "food/train")
    assert open_pixels("food", root).train.classes == ["apple_pie", "miso_soup", "waffles"]


@pytest.mark.parametrize(("name", "per_class"), [("caltech101", 30), ("caltech256", 60)])
def test_the_caltech_sets_train_on_as_many_images_of_each_class(
    small: Callable[[str], Path], name: str, per_class: int
) -> None:
    root = small(name)
    data, again = open_pixels(name, root), open_pixels(name, root)
    assert Counter(data.train.labels) == {0: per_class, 1: per_class, 2: per_class}
    assert (data.train.names, data.test.names) == (again.train.names, again.test.names)
    # Drawn, not the first ones; and on every machine the same, or accuracies could not be compared.
    held_out = [Path(file).stem.removeprefix("image_") for file in data.test.names]
    assert (
        held_out
        == {
            "caltech101": ["0002", "0007", "0023", "0005", "0027", "0012"],
            "caltech256": ["001_0005", "001_0021", "002_0026", "003_0007", "003_0030", "003_0035", "003_0042"],
        }[name]
    )


@pytest.mark.parametrize(("name", "per_class"), [("caltech101", 30), ("caltech256", 60)])
def test_the_first_images_train_where_the_public_codes_split_is_asked_for(
    small: Callable[[str], Path], name: str, per_class: int
) -> None:
    """By the numbers in the files' names, for every class."""
    root = small(name)
    data = open_pixels(name, root, split="first")
    assert data.name == f"{name}_first"  # another split is another data set: records never mix
    for part, is_first in ((data.train, True), (data.test, False)):
        numbers = [int(Path(file).stem[-4:]) for file in part.names]
        assert all((number <= per_class) is is_first for number in numbers)
    assert Counter(data.train.labels) == {0: per_class, 1: per_class, 2: per_class}
    assert sorted([*data.train.names, *data.test.names]) == sorted(
        name for part in (open_pixels(name, root).train, open_pixels(name, root).test) for name in part.names
    )
    for other in ("pets", str(root)):
        with pytest.raises(InputError, match="--split first is for caltech101 and caltech256"):
            open_transfer_data(other, root, split="first")
    with pytest.raises(InputError, match="split"):
        open_transfer_data(name, root, split="last")


def test_images_of_an_array_are_kept_to_the_bit_also_by_a_cache_and_in_other_processes(
    small: Callable[[str], Path], tmp_path: Path
) -> None:
    root = small("cifar10")
    data = open_pixels("cifar10", root).train
    batch = pickle.loads((root / "cifar-10-batches-py/data_batch_2").read_bytes())
    expected = torch.from_numpy(batch["data"]).view(-1, 3, 32, 32)
    assert torch.equal(torch.stack([data[index][0] for index in range(3, 6)]), expected)
    assert find_unreadable(data, workers=2) == {}
    data.cache = ResizedCache(tmp_path / "cache", 400)
    for _ in range(2):
        assert torch.equal(torch.stack([data[index][0] for index in range(3, 6)]), expected)
    # Another picture under the same name is not taken from the cache.
    batch["data"] = 255 - batch["data"]
    (root / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps(batch))
    data = open_pixels("cifar10", root).train
    data.cache = ResizedCache(tmp_path / "cache", 400)
    assert torch.equal(data[3][0], 255 - expected[0])


def test_flowers_that_torchvision_does_not_name_are_numbered(
    small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small("flowers")
    monkeypatch.delattr(datasets.Flowers102, "classes")
    data = open_pixels("flowers", root)
    assert data.train.classes == data.test.classes == ["0", "1", "2"]
    assert data.train.labels == [1, 2, 0, 2, 0, 1]


def test_an_image_is_named_by_its_place_under_the_data_root(small: Callable[[str], Path]) -> None:
    root = small("dtd")
    data = open_pixels("dtd", root)
    (root / data.test.names[5]).write_bytes(b"no picture")
    with pytest.raises(ImageInputError, match=r"dtd/dtd/images/texture_05/texture_05_0003\.jpg \(not in a known"):
        data.test[5]
    assert list(find_unreadable(data.test, workers=0)) == [data.test.names[5]]


def test_nothing_is_decoded_at_opening(small: Callable[[str], Path]) -> None:
    root = small("pets")
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    assert len(open_pixels("pets", root).train) == 6


# What is refused


@pytest.mark.parametrize("name", TRANSFER_DATASETS)
def test_what_is_missing_is_said_with_its_source_and_place(tmp_path: Path, name: str) -> None:
    row = TRANSFER_DATASETS[name]
    with pytest.raises(MissingDataError) as info:
        open_pixels(name, tmp_path)
    for text in (row.title, str(tmp_path), row.source, "https://", f"{name}/train and {name}/test", *row.layout):
        assert text in str(info.value)
    assert "download=True" not in str(info.value)
    assert check(row, tmp_path) == ("missing", str(info.value))
    assert list(tmp_path.iterdir()) == []  # torchvision would leave a folder


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data"),
        ("caltech101", "caltech101/101_ObjectCategories"),
        ("caltech101", "caltech101/101_ObjectCategories/BACKGROUND_Google"),
        ("caltech256", "caltech256/256_ObjectCategories"),
        ("cars", "stanford_cars/cars_train"),
        ("cars", "stanford_cars/cars_test"),
        ("cars", "stanford_cars/devkit"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("dtd", "dtd/dtd/images"),
        ("dtd", "dtd/dtd/labels"),
        ("flowers", "flowers-102/jpg"),
        ("flowers", "flowers-102/imagelabels.mat"),
        ("flowers", "flowers-102/setid.mat"),
        ("food", "food-101/images"),
        ("food", "food-101/meta"),
        ("pets", "oxford-iiit-pet/images"),
        ("pets", "oxford-iiit-pet/annotations"),
        ("sun397", "SUN397/ClassName.txt"),
        ("sun397", "SUN397/Training_01.txt"),
        ("sun397", "SUN397/Testing_01.txt"),
    ],
)
def test_each_part_of_a_layout_is_missed(small: Callable[[str], Path], tmp_path: Path, name: str, path: str) -> None:
    root = small(name)
    (root / path).rename(tmp_path / "elsewhere")
    with pytest.raises(MissingDataError, match=rf"not in \S*/data \({path} is missing\): get it from"):
        open_pixels(name, root)
    (tmp_path / "elsewhere").rename(root / path)
    open_pixels(name, root)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("count_name", "what"),
    [("num_classes", "classes"), ("train_images", "training images"), ("test_images", "test images")],
)
def test_other_counts_than_the_table_has_are_refused_with_both_numbers(
    small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, count_name: str, what: str
) -> None:
    root = small(name)
    row = TRANSFER_DATASETS[name]
    found = getattr(row, count_name)
    row = replace(row, **{count_name: 12_345})
    monkeypatch.setitem(TRANSFER_DATASETS, name, row)
    with pytest.raises(DifferentDataError, match=rf", it has {found} {what} instead of 12,345: .* by its path"):
        open_pixels(name, root)
    state, detail = check(row, root)
    assert state == "differs"
    assert f"{found} {what} instead of 12,345" in detail


def test_every_count_that_differs_is_said(tmp_path: Path) -> None:
    """Textures have 47 classes; a table with 57 would train outputs that no image has."""
    write_folders(tmp_path / "dtd", {"train": {"a": 2, "b": 1}, "test": {"a": 1, "b": 1}})
    text = "2 classes instead of 47, 3 training images instead of 3,760, 2 test images instead of 1,880"
    with pytest.raises(DifferentDataError, match=text):
        open_pixels("dtd", tmp_path)
    assert len(open_pixels(tmp_path / "dtd").train) == 3  # a subset has a path


@pytest.mark.parametrize(
    ("name", "class_name", "least"), [("caltech101", "wrench", 30), ("caltech256", "002.spider", 60)]
)
def test_a_class_too_small_to_split_is_refused(
    small: Callable[[str], Path], name: str, class_name: str, least: int
) -> None:
    root = small(name)
    folder = root / name / f"{name[-3:]}_ObjectCategories" / class_name
    max(folder.glob("*.jpg")).unlink()
    with pytest.raises(
        InputError, match=rf"^class {class_name} of \S*/{name} has {least} images, {least} to train and one"
    ):
        open_pixels(name, root)
    assert check(TRANSFER_DATASETS[name], root)[0] == "unusable"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(InputError, match=f"class {class_name} of .*{name} has 0 images"):
        open_pixels(name, root)


@pytest.mark.parametrize("name", ["cars", "flowers"])
def test_a_missing_scipy_is_said(small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = small(name)
    for module in [module for module in sys.modules if module.partition(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    title = TRANSFER_DATASETS[name].title
    with pytest.raises(
        InputError, match=f"^the lists of {title} are read by scipy, which is missing: pip install scipy$"
    ):
        open_pixels(name, root)


def test_damaged_files_are_refused_in_one_sentence(
    small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small("cifar100")
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", "16019d7e3df5f24257cddd939b257f8d"]])
    text = (
        r"^cannot use .*/cifar-100-python \(Dataset not found or corrupted\): get CIFAR-100 anew from https://\S+ or by"
    )
    with pytest.raises(InputError, match=text) as info:
        open_pixels("cifar100", root)
    assert "download=True" not in str(info.value)
    assert check(TRANSFER_DATASETS["cifar100"], root)[0] == "unusable"


def lose_a_list(root: Path) -> None:
    (root / "dtd/dtd/labels/val1.txt").unlink()


def lose_a_class_of_a_list(root: Path) -> None:
    path = root / "dtd/dtd/labels/val1.txt"
    write(path, path.read_text().splitlines()[1:])


def copy_a_list(root: Path) -> None:
    shutil.copy(root / "dtd/dtd/labels/val1.txt", root / "dtd/dtd/labels/test1.txt")


def empty_a_list(root: Path) -> None:
    write(root / "dtd/dtd/labels/test1.txt", [])


def empty_a_class_of_the_test_part(root: Path) -> None:
    path = root / "dtd/dtd/labels/test1.txt"
    rest = path.read_text().splitlines()[1:]
    paint(root / "dtd/dtd/images/texture_46/extra.jpg")
    write(path, [*rest, "texture_46/extra.jpg"])


def misname_a_class(root: Path) -> None:
    path = root / "SUN397/Training_01.txt"
    path.write_text(path.read_text().replace("apse/indoor", "apse/outdoor"))


def number_breeds_with_a_gap(root: Path) -> None:
    path = root / "oxford-iiit-pet/annotations/test.txt"
    lines = path.read_text().splitlines()
    write(path, [lines[0], lines[2], lines[2].replace("_300", "_301")])


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (
            "dtd",
            lose_a_list,
            r"cannot use \S*/dtd \(No such file or directory: \S*/dtd/dtd/labels/val1\.txt\): get DTD",
        ),
        ("dtd", lose_a_class_of_a_list, r"cannot use \S*/dtd \(the lists train and val have different classes\)"),
        ("dtd", copy_a_list, r"\(dtd/dtd/images/texture_00/texture_00_0002\.jpg is in both train and test\)"),
        ("dtd", empty_a_list, r"0 test images instead of 47"),
        ("dtd", empty_a_class_of_the_test_part, r"class texture_00 of \S*/dtd has no image in its test part: add some"),
        ("sun397", misname_a_class, r"cannot use \S*/SUN397 \(KeyError: 'apse/outdoor'\): get SUN397 anew"),
        (
            "pets",
            number_breeds_with_a_gap,
            r"class American Bulldog of \S*/oxford-iiit-pet has no image in its test part",
        ),
    ],
)
def test_lists_that_cannot_be_are_refused(
    small: Callable[[str], Path], name: str, damage: Callable[[Path], None], text: str
) -> None:
    root = small(name)
    damage(root)
    with pytest.raises(InputError, match=text):
        open_pixels(name, root)


def test_a_name_needs_the_data_root_and_has_its_metric(small: Callable[[str], Path]) -> None:
    root = small("food")
    with pytest.raises(InputError, match=r"food is looked up in the folder of all data sets: .*--data-root"):
        open_pixels("food")
    with pytest.raises(InputError, match=r"Food-101 is measured by top1, not mean_per_class: leave the metric out"):
        open_pixels("food", root, metric="mean_per_class")
    assert open_pixels("food", root, metric="top1").metric == "top1"


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no data set or folder fruit: choose one of aircraft, birdsnap, .*sun397, or"
    ):
        open_pixels("fruit", tmp_path)


# Folders of one's own


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_folder_of_ones_own_has_two_parts_and_either_metric(tmp_path: Path, part: str) -> None:
    root = write_folders(tmp_path / "fruit", {"train": {"apple": 2, "pear": 1}, part: {"apple": 1, "pear": 2}})
    data = open_pixels(root)
    assert (data.name, data.metric) == ("fruit", "top1")
    assert ours(data.train) == theirs(datasets.ImageFolder(root / "train"))
    assert ours(data.test) == theirs(datasets.ImageFolder(root / part))
    assert open_pixels(root, tmp_path, metric="mean_per_class").metric == "mean_per_class"
    with pytest.raises(InputError, match="unknown metric 'top5': choose one of mean_per_class, top1"):
        open_pixels(root, metric="top5")


@pytest.mark.parametrize(("folder", "name"), [("cifar10", "own_cifar10"), ("caltech101_first", "own_caltech101_first")])
def test_a_folder_of_ones_own_is_not_called_as_a_data_set_of_the_table(tmp_path: Path, folder: str, name: str) -> None:
    """Tables put the paper's numbers beside that name."""
    root = write_folders(tmp_path / folder, {part: {"cat": 2, "dog": 1} for part in ("train", "test")})
    assert open_pixels(root).name == name


def test_test_comes_before_val(tmp_path: Path) -> None:
    write_folders(
        tmp_path, {part: {"a": count, "b": 1} for count, part in enumerate(("train", "test", "val"), start=1)}
    )
    assert len(open_pixels(tmp_path).test) == 3


@pytest.mark.parametrize(
    ("parts", "missing"), [(["train"], "test"), (["test"], "train"), (["val"], "train"), ([], "train")]
)
def test_a_folder_without_a_part_is_refused(tmp_path: Path, parts: list[str], missing: str) -> None:
    write_folders(tmp_path, {part: {"a": 1} for part in parts})
    with pytest.raises(InputError, match=rf"no folder \S*/{missing}: a data set's folder holds train/ and test/"):
        open_pixels(tmp_path)


@pytest.mark.parametrize(("lacking", "other"), [("test", "train"), ("train", "test")])
def test_the_first_class_that_one_part_lacks_is_named(tmp_path: Path, lacking: str, other: str) -> None:
    write_folders(tmp_path, {other: {"a": 1, "b": 1, "c": 1, "d": 1}, lacking: {"a": 1, "d": 1}})
    with pytest.raises(InputError, match=rf"class b of \S* has no image in its {lacking} part: add some, or remove it"):
        open_pixels(tmp_path)
    write_folders(tmp_path, {lacking: {"b": 1}})
    (tmp_path / lacking / "c").mkdir()
    with pytest.raises(InputError, match="classes c"):  # torchvision's own words
        open_pixels(tmp_path)


def test_one_class_of_which_every_network_is_right_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": {"images": 2}, "test": {"images": 1}})
    with pytest.raises(InputError, match=r"train holds one class, images, .* folder"):
        open_pixels(tmp_path)


def write_shard(root: Path, labels: list[int], classes: list[str]) -> None:
    root.mkdir(parents=True)
    write(root / "classes.txt", classes)
    with tarfile.open(root / "0.tar", "w") as archive:
        for index, label in enumerate(labels):
            image = np.full((5, 5, 3), 10 * index + label, np.uint8)
            for extension, content in (("png", cv2.imencode(".png", image)[1].tobytes()), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{index}.{extension}")
                info.size = len(content)
                archive.addfile(info, BytesIO(content))


def test_a_part_may_be_shards_that_number_the_classes_as_the_other_does(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": {"a": 1, "b": 2}})
    write_shard(tmp_path / "test", [1, 0], ["a", "b"])
    data = open_pixels(tmp_path)
    assert [(label, name) for _, _, label, name in ours(data.test)] == [(1, "b"), (0, "a")]
    write(tmp_path / "test/classes.txt", ["b", "a"])
    with pytest.raises(InputError, match=r"train and test of \S* number the classes differently: .*classes\.txt"):
        open_pixels(tmp_path)


# Real images


@pytest.mark.real_data
def test_a_real_subset_is_a_folder_of_ones_own(real_data: Path) -> None:
    data = open_transfer_data(str(real_data / "caltech101_mini"), None, metric="mean_per_class")
    assert (data.name, data.metric, len(data.train.classes)) == ("caltech101_mini", "mean_per_class", 20)
    assert set(Counter(data.train.labels).values()) == {28}
    assert set(Counter(data.test.labels).values()) == {12}
    assert not set(data.train.names) & set(data.test.names)
    train, test = ({item[1] for item in ours(part)} for part in (data.train, data.test))
    assert (len(train), len(test), train & test) == (560, 240, set())


@pytest.mark.slow
@pytest.mark.real_data
def test_the_whole_of_a_real_data_set_passes_for_it_and_a_part_does_not(real_data: Path, tmp_path: Path) -> None:
    """All of its files are there, and those with pixels that are looked at."""
    with tarfile.open(real_data / "cifar10.tar.gz") as archive:
        for member in archive:
            path = tmp_path / "cifar10" / member.name
            if not member.isfile() or member.name in ("train/truck/4999.jpg", "test/airplane/0000.jpg"):
                archive.extract(member, tmp_path / "cifar10", filter="data")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    data = open_transfer_data("cifar10", tmp_path)
    assert (data.metric, len(data.train), len(data.test)) == ("top1", 50_000, 10_000)
    assert data.train[49_999][0].shape == (3, 32, 32)
    assert ours(data.test.take([0])) == ours(open_dataset(tmp_path / "cifar10/test", PIXELS).take([0]))
    (tmp_path / "cifar10/train/truck/0000.jpg").unlink()
    assert check(TRANSFER_DATASETS["cifar10"], tmp_path)[1].count("49,999 training images instead of 50,000") == 1
