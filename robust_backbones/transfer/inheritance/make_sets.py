"""Related data sets made of photographs: sketched, cartooned, or under a corruption."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
from numpy.typing import NDArray
from torchvision.transforms import v2

from robust_backbones.data.corruptions import check_corruption, corrupt, image_seed, load_library
from robust_backbones.data.datasets import ClassificationDataset, in_workers, open_dataset
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.files import write_json
from robust_backbones.runs.identity import FINGERPRINT, differences, read_settings
from robust_backbones.transfer.protocol import drawn_by_class

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
    load_library()


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
    make = partial(_made, dataset, _stems(dataset), kind, seed)
    for path, data in in_workers(make, len(dataset), workers=workers, description=kind):
        (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            (unfinished / path).write_bytes(data)  # here: of what fails a worker would not say why
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(unfinished / path)) from error
    write_json(unfinished / NOTE, note)
    unfinished.rename(target)
    return len(dataset)


def _stems(dataset: ClassificationDataset) -> list[str]:
    """A name for the file of each image, each another one within a class, which may have folders or several shards."""
    files = [(Path(name).name, label) for name, label in zip(dataset.names, dataset.labels, strict=True)]
    count = Counter(files)
    return [f if count[f, c] == 1 else quote(n, "") for n, (f, c) in zip(dataset.names, files, strict=True)]


def _made(
    dataset: ClassificationDataset, stems: Sequence[str], kind: str, seed: int, position: int
) -> tuple[Path, bytes]:
    """An image's file within the set, and its content."""
    image = dataset.load(position).permute(1, 2, 0).contiguous().numpy()
    made = apply(image, kind, name=dataset.names[position], seed=seed)
    encoded, data = cv2.imencode(".png", made[..., ::-1])
    assert encoded
    return Path(dataset.classes[dataset.labels[position]], f"{stems[position]}.png"), data.tobytes()
