"""Images in WebDataset shards (tar files of samples), with random access instead of streaming."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from robust_backbones.data.decoding import visible
from robust_backbones.data.images import ImageFiles
from robust_backbones.errors import InputError, plural

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class ShardImages(ImageFiles):
    """Samples of all ``*.tar`` files of a folder, shard by shard in sorted order.

    A sample is formed by neighbouring members with the same key, the path up to the basename's first dot: ``KEY.jpg``
    (or .jpeg, .png) and ``KEY.cls`` with the label as a decimal number; other members are skipped. ``classes.txt``
    beside the shards names the classes, one per line; without it they are "0", "1", ...

    WebDataset itself streams: it shuffles within a buffer, and neither splits an epoch exactly over processes nor
    starts in the middle of one. With an index of all images, shards are a data set like any other, which can do all
    three. The price is that shards must be on a file system, not at a URL.
    """

    paths: list[Path]
    places: NDArray[np.int64]
    """Shape (images, 3): index into ``paths``, offset and size in bytes."""
    stamps: list[tuple[int, int]]
    """For each shard: size in bytes and modification time in ns."""

    @classmethod
    def scan(cls, root: Path) -> ShardImages:
        """Index the shards, reading only headers of images. An image's name is ``SHARD.tar:MEMBER``.

        Raises:
            InputError: a shard is damaged or compressed; a sample lacks its image or label; a label is not a class; a
                class has no sample.
        """
        paths = [path for path in visible(root) if path.suffix == ".tar"]
        labels, names, places = [], [], []
        for shard, path in enumerate(paths):
            for member, label, offset, size in _samples(path):
                labels.append(label)
                names.append(f"{path.name}:{member}")
                places.append((shard, offset, size))
        stamps = [(file.st_size, file.st_mtime_ns) for file in (path.stat() for path in paths)]
        return cls(root, _classes(root, labels, names), labels, names, paths, np.array(places), stamps)

    def read(self, index: int) -> bytes:
        # A shard is opened for each image, as the file of a folder is: a thousand kept open exceed the usual limit of
        # a process, and descriptors do not travel to workers that are spawned.
        shard, offset, size = self.places[index].tolist()
        with open(self.paths[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def stamp(self, index: int) -> tuple[int, ...]:
        shard, offset, _ = self.places[index].tolist()
        return *self.stamps[shard], offset


def _classes(root: Path, labels: list[int], names: list[str]) -> list[str]:
    """The classes' names, after checking that labels and classes match."""
    if not labels:
        raise InputError(f"the shards in {root} hold no sample: each needs KEY.jpg (or .jpeg, .png) and KEY.cls")
    path = root / "classes.txt"
    present = set(labels)
    if path.exists():
        try:
            classes = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no text in UTF-8 ({error.reason}): write it anew") from None
        if max(present) >= len(classes):
            name = names[next(index for index, label in enumerate(labels) if label >= len(classes))]
            raise InputError(
                f"the label of {name} is beyond the {plural(len(classes), 'class')} in {path}: correct either"
            )
        total = len(classes)
    else:
        total = max(present) + 1
    if len(present) < total:
        missing = next(label for label in count() if label not in present)
        raise InputError(f"the shards in {root} hold no sample of class {missing}, of {total}: add some or renumber")
    return classes if path.exists() else [str(label) for label in range(total)]


def _samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """(name of the image member, label, offset and size of the image in bytes) of each sample."""
    with open(path, "rb") as file:
        keyed = ((_key(member[0]), member) for member in _members(file, path))
        for key, group in groupby((pair for pair in keyed if pair[0]), key=itemgetter(0)):
            images, labels = [], []
            for _, (name, offset, size) in group:
                extension = name[len(key) + 1 :].lower()
                if extension in IMAGE_EXTENSIONS:
                    images.append((name, offset, size))
                elif extension == "cls":
                    file.seek(offset)
                    labels.append(file.read(min(size, 100)))
            if not images and not labels:
                continue  # a note, or what other programs keep in a shard
            if len(images) != 1 or len(labels) != 1:
                raise InputError(
                    f"sample {key} of {path} has {plural(len(images), 'image')} and {plural(len(labels), 'label')}: "
                    f"it needs {key}.jpg (or .jpeg, .png) and {key}.cls, side by side"
                )
            if not re.fullmatch(rb"\s*\d{1,9}\s*", labels[0]):
                raise InputError(f"{key}.cls of {path} is not a class number: it must hold a decimal number >= 0")
            name, offset, size = images[0]
            yield name, int(labels[0]), offset, size


def _key(name: str) -> str | None:
    """The common key of a sample's members, as in WebDataset; None if the member is not part of a sample."""
    match = re.match(r"((?:.*/)?[^./]+)\.[^/]*$", name)
    return match[1] if match and not re.match(r"__[^/]*__(/|$)", name) else None


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of an open tar archive."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps a million of them
            end = archive.offset
    except tarfile.TarError as error:
        file.seek(0)
        if file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
            raise InputError(f"{path} is compressed: unpack it, images hardly shrink anyway") from None
        raise InputError(f"{path} is damaged or no tar file ({error}): copy or pack it again") from None
    # An archive ends with empty blocks; at a damaged header, or where `cat` joined two, tarfile stops all the same.
    file.seek(end)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise InputError(f"{path} is damaged or several archives in one (at byte {end}): copy or pack it again")
