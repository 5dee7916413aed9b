"""The images of a data set: in separate files, as in ImageNet's layout, or as defined by subclasses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import ImageFolder

from robust_backbones.data.decoding import is_hidden, is_image, visible
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.distributed import is_first_process


class _ClassFolders(ImageFolder):
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        return classes, {name: number for number, name in enumerate(classes)}


def warn_of_left_out(root: Path, others: Iterable[str]) -> None:
    """Print which files of a data set may be images and are left out; by the first process.

    Args:
        others: the files in its class folders that are not images by their names.
    """
    if not is_first_process():
        return
    loose = [str(path) for path in visible(root) if is_image(path.name) and path.is_file()]
    unknown = [path for path in others if not is_hidden(path[len(str(root)) :]) and not path.lower().endswith(_NOTES)]
    for paths, where, mend in (
        (loose, f"beside the class folders of {root}", "move each into the folder of its class, or away"),
        (
            unknown,
            f"in {root} with the suffix of no format that Pillow reads",
            "convert or rename those that are images",
        ),
    ):
        if paths:
            print(f"warning: left out: {plural(len(paths), 'file')} {where}, the first {paths[0]}: {mend}", flush=True)


_NOTES = (".txt", ".md", ".html", ".csv", ".json", ".xml", ".yaml", ".db", ".ini", ".lnk")
"""Suffixes of what people and systems keep beside images."""


@dataclass(frozen=True)
class ImageFiles:
    """Images and their classes; ``labels`` and ``names`` have one entry per image."""

    root: Path
    classes: list[str]
    labels: list[int]
    names: list[str]
    """Paths relative to ``root``, or equivalent names for images without a separate file."""

    @classmethod
    def scan(cls, root: Path) -> ImageFiles:
        """List the images in one folder per class without opening them, in torchvision's order, in any format that
        Pillow reads, also those that torchvision skips, such as .jfif and .gif. Hidden folders and files are left out;
        of others that are left out it warns.

        Raises:
            InputError: a class folder has no image.
        """
        start, left_out = len(str(root)), list[str]()

        def is_valid(path: str) -> bool:
            valid = is_image(path[start:])
            if not valid:
                left_out.append(path)
            return valid

        try:
            listing = _ClassFolders(str(root), is_valid_file=is_valid)
        except FileNotFoundError as error:  # torchvision says which classes are empty, in several lines
            raise InputError(f"cannot use {root}: {str(error).splitlines()[0].rstrip('. ')}; add or remove") from None
        warn_of_left_out(root, left_out)
        names = [os.path.relpath(path, root) for path, _ in listing.samples]
        return ImageFiles(root, listing.classes, listing.targets, names)

    def read(self, index: int) -> bytes:
        """The image file's bytes."""
        return (self.root / self.names[index]).read_bytes()

    def stamp(self, index: int) -> tuple[int, ...]:
        """Numbers that change when the image does: size in bytes and modification time in ns."""
        status = (self.root / self.names[index]).stat()
        return status.st_size, status.st_mtime_ns
