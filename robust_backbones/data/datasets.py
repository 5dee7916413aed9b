"""Classification data in any layout, with augmentation that depends only on the seed."""

from __future__ import annotations

import copy
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from robust_backbones.data.decoding import ImageInputError, ResizedCache, decode, visible
from robust_backbones.data.images import ImageFiles
from robust_backbones.data.shards import ShardImages
from robust_backbones.data.shared_images import first_shared, shared_images
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.distributed import is_first_process
from robust_backbones.runs.files import refuse_damaged, write_json
from robust_backbones.runs.signals import stop_for_parent_only

T = TypeVar("T")
_COMPARED = 150_000
"""How many images of two data sets are compared at a start: in 5 s on a local disk. ImageNet's 1.3 million would take a
minute there, and many on a network disk."""


class ClassificationDataset(Dataset[tuple[Tensor, int]]):
    """Items are (uint8 image of shape (3, size, size), class index).

    The random part of an item depends only on (seed, epoch, its index in the full data set), not on workers, order,
    device or left-out images.

    Raises:
        ImageInputError: on access, an image that cannot be decoded.
    """

    in_memory = False
    """Whether items are in memory: then no processes are needed to load them."""

    def __init__(
        self, source: ImageFiles, transform: v2.Transform, *, seed: int = 0, cache: ResizedCache | None = None
    ) -> None:
        self.classes = source.classes
        self.labels = source.labels
        self.names = source.names
        self.root = source.root
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.cache = cache
        self._source = source
        self._short_side = 0
        self.indices: Sequence[int] = range(len(source.names))
        """Indices of the items in the full data set."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = self.load(position)
        # torchvision's transforms draw from the global generator only: lend it a seed of our own for one image.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, self.epoch, self.indices[position]))
            return self.transform(image), self.labels[position]

    def load(self, position: int) -> Tensor:
        """The image before its transform, uint8 of shape (3, H, W)."""
        image = self._read(position)
        if 0 < self._short_side < min(image.shape[1:]):
            return v2.functional.resize(image, [self._short_side], antialias=True)
        return image

    def _read(self, position: int) -> Tensor:
        index, name = self.indices[position], self.names[position]
        try:
            if self.cache is None:
                return decode(self._source.read(index), name)
            key = f"{self.root.name}/{name}"  # train and val may share names, and a cache
            return self.cache.load(key, self._source.stamp(index), lambda: self._source.read(index))
        except OSError as error:
            raise ImageInputError.of(name, error) from None

    def seen_through(
        self, transform: v2.Transform, *, epoch: int = 0, seed: int | None = None
    ) -> ClassificationDataset:
        """The same items through another transform, with the random draws of an epoch (and of another seed)."""
        view = copy.copy(self)
        view.transform, view.epoch = transform, epoch
        view.seed = self.seed if seed is None else seed
        return view

    def downscaled(self, short_side: int) -> ClassificationDataset:
        """The same items at lower resolution: the shorter side is reduced to ``short_side`` before the transform.

        Antialiased and bilinear; smaller images do not change. The transform enlarges them again to its size.
        """
        view = copy.copy(self)
        view._short_side = short_side
        return view

    def take(self, positions: Sequence[int]) -> ClassificationDataset:
        """The data set with only these items, in this order; the items do not change."""
        part = copy.copy(self)
        part.names = [self.names[position] for position in positions]
        part.labels = [self.labels[position] for position in positions]
        part.indices = [self.indices[position] for position in positions]
        return part

    def sample(self, count: int, *, seed: int) -> ClassificationDataset:
        """``count`` items in an order drawn by ``seed``; a larger count includes a smaller one's items."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].tolist())

    def fingerprint(self) -> str:
        """Identifies the images for ``runs.identity``, in any location: four hexadecimal digits for each of up to 16.

        These are the images whose names have the lowest hashes (MinHash, Broder 1997), a random but repeatable choice.
        Reading the sizes or bytes of all of ImageNet takes minutes on shared disks; the bytes of 16 files detect other
        data, though not one changed image among many.
        """

        def name(position: int) -> bytes:
            return os.fsencode(self.names[position])

        found = ""
        for position in heapq.nsmallest(16, range(len(self)), key=lambda place: hashlib.sha256(name(place)).digest()):
            with suppress(OSError):  # one that cannot be read stops the run, or is left out
                content = self._source.read(self.indices[position])
                labelled = b"%s\0%d\0%s" % (name(position), self.labels[position], content)
                found += hashlib.sha256(labelled).hexdigest()[:4]
        return found

    def without(self, names: Collection[str]) -> ClassificationDataset:
        """The data set without the named images; the other items do not change.

        Raises:
            InputError: a name that is not in the data set; a class that loses its last image.
        """
        if unknown := sorted(set(names) - set(self.names)):
            raise InputError(f"cannot leave out {unknown[0]}: it is not in {self.root}")
        left_out = set(names)
        rest = self.take([position for position, name in enumerate(self.names) if name not in left_out])
        if emptied := sorted(set(self.labels) - set(rest.labels)):
            raise InputError(
                f"class {self.classes[emptied[0]]} of {self.root} keeps no image: add some, or remove the class"
            )
        return rest


def open_dataset(
    root: str | Path, transform: v2.Transform, *, seed: int = 0, cache: ResizedCache | None = None
) -> ClassificationDataset:
    """The images in ``root``, which has either one folder per class or WebDataset shards (see ``ShardImages``).

    Raises:
        InputError: ``root`` is missing or has neither layout, or its content cannot be used.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no folder {root}: expected one folder of images a class in it, or shards (*.tar)")
    shards = any(path.suffix == ".tar" for path in visible(root))
    folders = any(path.is_dir() for path in visible(root))
    if shards == folders:
        found = "both class folders and shards" if shards else "neither class folders nor shards"
        raise InputError(f"{root} holds {found} (*.tar, not compressed): expected one of the two")
    source: ImageFiles = ShardImages.scan(root) if shards else ImageFiles.scan(root)
    return ClassificationDataset(source, transform, seed=seed, cache=cache)


def check_several(classes: Sequence[str], folder: Path) -> None:
    """Raise InputError where all images of ``folder`` are of one class: any network would be right about each."""
    if len(classes) == 1:
        raise InputError(
            f"{folder} holds one class, {classes[0]}, of which any network is right: give a folder to each class"
        )


def warn_of_shared(*parts: ClassificationDataset) -> None:
    """Print which of the data sets share images, links and copies too, if these are files; shards are not opened.

    Called by every process, and done by the first. In data sets that are too large for it (see ``_COMPARED``), only
    images of the same name in the same class folder are compared.
    """
    parts = tuple(part for part in parts if type(part._source) is ImageFiles and is_first_process())
    every = sum(map(len, parts)) * (len(parts) - 1) <= _COMPARED
    for (one, ones), (other, others) in combinations([(part, set(part.names)) for part in parts], 2):
        names = (ones, others) if every else (ones & others, ones & others)
        # What is one folder under two names, such as a link to it, is seen without a look at its files.
        folders = (os.path.realpath(one.root), os.path.realpath(other.root))
        train, test = ([f"{root}/{name}" for name in some] for root, some in zip(folders, names, strict=True))
        if shared := shared_images(test, train):
            told = f"shares {plural(len(shared), 'image')} with {one.root}, the first: {first_shared(shared)}"
            print(f"warning: {other.root} {told}; accuracy on them does not tell of others", flush=True)


def find_unreadable(dataset: ClassificationDataset, *, workers: int) -> dict[str, str]:
    """Decode every image once; returns name -> reason for unreadable ones. With a cache, this fills it."""
    reasons = in_workers(partial(_problem, dataset), len(dataset), workers=workers, description="checking images")
    return {name: reason for name, reason in zip(dataset.names, reasons, strict=True) if reason}


def _problem(dataset: ClassificationDataset, position: int) -> str:
    """Why an image cannot be read; "" if it can."""
    try:
        dataset.load(position)
    except ImageInputError as error:
        return error.reason
    return ""


def skip_list(path: Path, parts: Mapping[str, ClassificationDataset], *, workers: int) -> dict[str, dict[str, str]]:
    """The result of ``find_unreadable`` for each part, by ``path``; the list of the first start holds for the run."""
    if not path.exists():
        write_json(path, {part: find_unreadable(images, workers=workers) for part, images in parts.items()})
    with refuse_damaged(path, "remove it, and all images are looked at again"):
        skipped = dict(json.loads(path.read_text()))
        return {part: dict(skipped[part]) for part in parts}


def in_workers(function: Callable[[int], T], count: int, *, workers: int, description: str) -> Iterator[T]:
    """``function`` of 0 to ``count`` - 1, in order, computed by ``workers`` processes."""
    loader: DataLoader[int] = DataLoader(
        range(count),  # type: ignore[arg-type]
        batch_size=16,
        num_workers=workers,
        collate_fn=partial(_each, function),  # in the workers
        worker_init_fn=init_worker,
        generator=torch.Generator(),
    )
    with tqdm(total=count, desc=description, unit="img", disable=None, leave=False) as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


def _each(function: Callable[[int], T], positions: Sequence[int]) -> list[T]:
    return [function(position) for position in positions]


def init_worker(worker: int) -> None:
    """Use one thread per process; OpenCV's own thread pool does not survive a fork either."""
    cv2.setNumThreads(0)
    stop_for_parent_only()


def mix(seed: int, epoch: int, index: int) -> int:
    """A 62-bit seed for one image of one epoch; tuples of integers hash the same in every process."""
    return hash((seed, epoch, index)) & (2**62 - 1)
