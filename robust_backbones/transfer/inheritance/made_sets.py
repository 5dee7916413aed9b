"""Related data sets made from one of photographs: corrupted, sketched, cartooned; the same pixels every time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from robust_backbones.data.corruptions import check_corruption, corrupt, image_seed
from robust_backbones.data.corruptions import load_library as load_corruptions
from robust_backbones.data.datasets import ClassificationDataset, init_worker, open_dataset
from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_json
from robust_backbones.transfer.protocol import drawn_by_class

Image = NDArray[np.uint8]
"""Shape (H, W, 3), RGB, 0-255."""
NOTE = "made.json"
"""Beside the class folders of a set: what it was made from, and how."""


def sketch(image: Image) -> Image:
    """A pencil drawing: the gray image divided by its blurred self, which leaves edges on white paper."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    paper = cv2.GaussianBlur(gray, (0, 0), sigmaX=1 + 0.02 * min(gray.shape))
    drawing = cv2.divide(gray, np.maximum(paper, 1), scale=255)
    return cv2.cvtColor(drawing, cv2.COLOR_GRAY2RGB)


def cartoon(image: Image, *, levels: int = 6, passes: int = 3) -> Image:
    """Flat colours between dark lines: bilateral filters, few levels a channel, and the edges of the gray image."""
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
    """The image as a set of this kind has it; ``name`` and ``seed`` decide what is random in it."""
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
    """Write ``output/KIND`` with the class folders of ``source``, as PNG of the same size, whole or not at all.

    Args:
        images_per_class: only so many of each class, drawn by ``seed``; 0: all.
        skip: leave out the first so many of each class's draw, which other sets hold.

    Returns:
        The number of its images. A set that is there is kept, if it was made in this way.

    Raises:
        InputError: an unknown kind, a source without images or with too few to skip so many, another set of that name.
    """
    source, output = Path(source), Path(output)
    check_kind(kind)
    dataset = open_dataset(source, v2.Identity())
    if images_per_class:
        positions: list[int] = []
        for drawn in drawn_by_class(dataset.labels, seed, stream=-3):
            if skip and len(drawn) < skip + images_per_class:
                raise InputError(
                    f"{dataset.classes[dataset.labels[drawn[0]]]} has {len(drawn)} images, too few for {skip} in other "
                    f"sets and {images_per_class} here"
                )
            positions += drawn[skip : skip + images_per_class]
        dataset = dataset.take(sorted(positions))
    note = {"kind": kind, "source": source.name, "seed": seed, "skip": skip, "images": len(dataset)}
    target, unfinished = output / kind, output / f".{kind}.unfinished"
    if target.exists():
        path = target / NOTE
        if path.exists() and json.loads(path.read_text()) == note:
            return len(dataset)
        raise InputError(f"{target} holds another set: remove it, or choose another --output")
    shutil.rmtree(unfinished, ignore_errors=True)
    loader = DataLoader(
        _Maker(dataset, unfinished, kind, seed),
        batch_size=16,
        num_workers=workers,
        collate_fn=len,
        worker_init_fn=init_worker,
        generator=torch.Generator(),
    )
    with tqdm(total=len(dataset), desc=kind, unit="img", disable=None, leave=False) as progress:
        for count in loader:
            progress.update(count)
    write_json(unfinished / NOTE, note)
    unfinished.rename(target)
    return len(dataset)


class _Maker(Dataset[int]):
    """Items are written, and give their position."""

    def __init__(self, dataset: ClassificationDataset, output: Path, kind: str, seed: int) -> None:
        self.dataset, self.output, self.kind, self.seed = dataset, output, kind, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> int:
        name = self.dataset.names[position]
        image = self.dataset.load(position).permute(1, 2, 0).contiguous().numpy()
        made = apply(image, self.kind, name=name, seed=self.seed)
        path = self.output / self.dataset.classes[self.dataset.labels[position]] / f"{Path(name).name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded, data = cv2.imencode(".png", made[..., ::-1])
        assert encoded
        path.write_bytes(data.tobytes())
        return position
