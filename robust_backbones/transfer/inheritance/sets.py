"""Data sets of some pre-training classes, to which logits are masked; and how to make them from photographs."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from urllib.parse import quote

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from robust_backbones.data.batches import val_batches
from robust_backbones.data.corruptions import check_corruption, corrupt, image_seed
from robust_backbones.data.corruptions import load_library as load_corruptions
from robust_backbones.data.datasets import ClassificationDataset, init_worker, open_dataset
from robust_backbones.data.decoding import is_hidden, visible
from robust_backbones.data.images import ImageFiles
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.files import write_json
from robust_backbones.runs.identity import FINGERPRINT, differences, read_settings
from robust_backbones.transfer.protocol import drawn_by_class

PRETRAINING = "pretraining"
"""The name of the pre-training validation set among the sets."""
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
    names, labels = [], []
    for index, folder in found:
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and not is_hidden(str(path.relative_to(folder)))
        )
        if not files:
            raise InputError(f"the class folder {folder} holds no image, and would widen the mask: remove it")
        names += [str(path.relative_to(root)) for path in files]
        labels += [position[index]] * len(files)
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
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in visible(folder))


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


Image = NDArray[np.uint8]
"""Shape (H, W, 3), RGB, 0-255."""
NOTE = "made.json"
"""File beside the class folders of a set: what it was made from, and how."""


def sketch(image: Image) -> Image:
    """A pencil drawing: the gray image divided by its blurred self, which leaves edges on white paper."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    paper = cv2.GaussianBlur(gray, (0, 0), sigmaX=1 + 0.02 * min(gray.shape))
    drawing = cv2.divide(gray, np.maximum(paper, 1), scale=255)
    return cv2.cvtColor(drawing, cv2.COLOR_GRAY2RGB)


def cartoon(image: Image, *, levels: int = 6, passes: int = 3) -> Image:
    """Flat colours between dark lines: bilateral filters, few levels per channel, and the edges of the gray image."""
    side = min(image.shape[:2])
    flat = image
    for _ in range(passes):
        flat = cv2.bilateralFilter(flat, d=7, sigmaColor=40, sigmaSpace=1 + 0.02 * side)
    step = 255 / (levels - 1)
    flat = (np.round(flat / step) * step).astype(np.uint8)
    block = 2 * max(1, round(0.03 * side)) + 1
    gray = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 3)
    lines = cv2.adaptiveThreshold(gray, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, blockSize=block, C=9)
    return np.where(lines[..., None] == 0, np.uint8(0), flat)


FILTERS: dict[str, Callable[[Image], Image]] = {
    "sketch": sketch,
    "cartoon": cartoon,
    "photograph": lambda image: image,  # as it is, for a set of those that the others were not made from
}


def check_kind(kind: str) -> None:
    """Raise ``InputError`` unless ``kind`` is one of FILTERS or a corruption with its severity, such as ``fog-3``."""
    if kind in FILTERS:
        return
    name, _, severity = kind.rpartition("-")
    if not re.fullmatch("[1-5]", severity):
        raise InputError(f"unknown kind {kind!r}: choose {', '.join(FILTERS)} or CORRUPTION-SEVERITY, such as fog-3")
    check_corruption(name, int(severity))
    load_corruptions()


def apply(image: Image, kind: str, *, name: str, seed: int) -> Image:
    """The image with this kind of change; ``name`` and ``seed`` determine its random numbers."""
    if kind in FILTERS:
        return FILTERS[kind](image)
    corruption, _, severity = kind.rpartition("-")
    return corrupt(image, corruption, int(severity), seed=image_seed(name, corruption, int(severity), seed))


def make_set(
    source: str | Path,
    output: str | Path,
    kind: str,
    *,
    images_per_class: int = 0,
    skip: int = 0,
    seed: int = 0,
    workers: int = 2,
) -> int:
    """Write ``output/KIND`` with the class folders of ``source``, as PNG of the same size, atomically.

    Args:
        images_per_class: number of images of each class, drawn by ``seed``; 0: all.
        skip: with ``images_per_class``, leave out the start of each class's draw, which other sets have.

    Returns:
        The number of its images. An existing set is kept if it was made in the same way.

    Raises:
        InputError: an unknown kind, a source without images or with fewer than ``skip``, another set of that name.
    """
    source, output = Path(source), Path(output)
    check_kind(kind)
    dataset = open_dataset(source, v2.Identity())
    if images_per_class:
        positions: list[int] = []
        for drawn in drawn_by_class(dataset.labels, seed, stream=-3):
            if skip and len(drawn) < skip + images_per_class:
                raise InputError(
                    f"{dataset.classes[dataset.labels[drawn[0]]]} has {plural(len(drawn), 'image')}, too few for "
                    f"{skip} in other sets and {images_per_class} here"
                )
            positions += drawn[skip : skip + images_per_class]
        dataset = dataset.take(sorted(positions))
    note = {"kind": kind, "source": source.name, "seed": seed, "skip": skip, "images": len(dataset)}
    note[FINGERPRINT] = dataset.fingerprint()
    target, unfinished = output / kind, output / f".{kind}.unfinished"
    if target.exists():
        path = target / NOTE
        if path.exists() and not differences(read_settings(path), note):
            return len(dataset)
        raise InputError(f"{target} holds another set: remove it, or choose another --output")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    loader = DataLoader(
        _Maker(dataset, kind, seed),
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=init_worker,
        generator=torch.Generator(),
    )
    with tqdm(total=len(dataset), desc=kind, unit="img", disable=None, leave=False) as progress:
        for images in loader:
            for path, data in images:  # written here: of what fails a worker would not say why
                (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (unfinished / path).write_bytes(data)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(unfinished / path)) from error
            progress.update(len(images))
    write_json(unfinished / NOTE, note)
    unfinished.rename(target)
    return len(dataset)


class _Maker(Dataset[tuple[Path, bytes]]):
    """Items are files of a set: path within it, content."""

    def __init__(self, dataset: ClassificationDataset, kind: str, seed: int) -> None:
        self.dataset, self.kind, self.seed = dataset, kind, seed
        files = [(Path(name).name, label) for name, label in zip(dataset.names, dataset.labels, strict=True)]
        count = Counter(files)  # a class may have folders, or lie in several shards
        self.files = [f if count[f, c] == 1 else quote(n, "") for n, (f, c) in zip(dataset.names, files, strict=True)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Path, bytes]:
        name = self.dataset.names[position]
        image = self.dataset.load(position).permute(1, 2, 0).contiguous().numpy()
        made = apply(image, self.kind, name=name, seed=self.seed)
        encoded, data = cv2.imencode(".png", made[..., ::-1])
        assert encoded
        return Path(self.dataset.classes[self.dataset.labels[position]], f"{self.files[position]}.png"), data.tobytes()
