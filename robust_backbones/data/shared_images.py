"""Test images that are also training images: the same file, a link to it, or a copy of it under any name."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TypeVar

_WORKERS, _PART = 8, 100  # files at once, which network disks need; many a task, which costs more than a look at a file
_START = 2**12  # bytes in which two photographs of one size differ
_File = tuple[int, int, int]
"""Size in bytes, device and inode: the same for all links to a file."""
T = TypeVar("T")


def shared_images(test: Iterable[str], train: Iterable[str]) -> dict[str, str]:
    """Test image -> the training image that is the same file or has the same bytes, by their paths, in order.

    A file is opened only if one of the other side has its size, and read to the end only if the two begin alike.
    """
    tested, trained = set(test), set(train)
    found = {path: path for path in tested & trained}
    if rest := sorted(tested - trained) if trained else []:
        with ThreadPoolExecutor(_WORKERS) as pool:
            originals, others = _files(sorted(trained), pool), _files(rest, pool)
            known = {file: paths[0] for file, paths in originals.items()}
            unseen = {file: paths[0] for file, paths in others.items() if file not in known}
            known |= _copies(unseen, known, pool)
        found |= {path: known[file] for file, paths in others.items() if file in known for path in paths}
    return dict(sorted(found.items()))


def first_shared(shared: Mapping[str, str]) -> str:
    """The first test image, and the training image that it is."""
    path, original = next(iter(shared.items()))
    return path if path == original else f"{path}, the same image as {original}"


def _files(paths: list[str], pool: ThreadPoolExecutor) -> dict[_File, list[str]]:
    """The paths of each file; a missing or empty one is no image."""
    found: dict[_File, list[str]] = {}
    for path, file in zip(paths, _each(_identity, paths, pool), strict=True):
        if file[0]:
            found.setdefault(file, []).append(path)
    return found


def _copies(unseen: Mapping[_File, str], known: Mapping[_File, str], pool: ThreadPoolExecutor) -> dict[_File, str]:
    """Those of ``unseen`` with the bytes of a ``known`` file, and its path."""
    sizes = {file[0] for file in known} & {file[0] for file in unseen}
    files, groups = [file for file in (*known, *unseen) if file[0] in sizes], list[list[_File]]()
    for length in (_START, -1):
        alike = defaultdict(list)
        paths = [unseen.get(file) or known[file] for file in files]
        for file, digest in zip(files, _each(partial(_digest, length), paths, pool), strict=True):
            alike[file[0], digest].append(file)  # known ones come first in every group
        groups = [group for group in alike.values() if group[0] in known and group[-1] in unseen]
        files = [file for group in groups for file in group]
    return {file: known[group[0]] for group in groups for file in group if file in unseen}


def _each(function: Callable[[str], T], paths: list[str], pool: ThreadPoolExecutor) -> Iterator[T]:
    parts = [paths[start : start + _PART] for start in range(0, len(paths), _PART)]
    return chain.from_iterable(pool.map(lambda part: [function(path) for path in part], parts))


def _identity(path: str) -> _File:
    try:
        status = os.stat(path)
        return status.st_size, status.st_dev, status.st_ino
    except OSError:
        return 0, 0, 0


def _digest(length: int, path: str) -> bytes:
    """SHA-256 of the first bytes of a file, for -1 of all; of one that cannot be read, what no other has."""
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.sha256(file.read(length)).digest()
    except OSError:
        return os.fsencode(path)
