"""The images of a data set: in separate files, as in ImageNet's layout, or as defined by subclasses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import ImageFolder

from robust_backbones.data.decoding import is_hidden, is_image
from robust_backbones.errors import InputError


class _ClassFolders(ImageFolder):
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        return classes, {name: number for number, name in enumerate(classes)}


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
        Pillow reads, also those that torchvision skips, such as .jfif and .gif. Hidden folders and files are left out.

        Raises:
            InputError: a class folder has no image.
        """
        start = len(str(root))
        try:
            listing = _ClassFolders(str(root), is_valid_file=lambda path: is_image(path[start:]))
        except FileNotFoundError as error:  # torchvision says which classes are empty, in several lines
            raise InputError(f"cannot use {root}: {str(error).splitlines()[0].rstrip('. ')}; add or remove") from None
        names = [os.path.relpath(path, root) for path, _ in listing.samples]
        return ImageFiles(root, listing.classes, listing.targets, names)

    def read(self, index: int) -> bytes:
        """The image file's bytes."""
        return (self.root / self.names[index]).read_bytes()

    def stamp(self, index: int) -> tuple[int, ...]:
        """Numbers that change when the image does: size in bytes and modification time in ns."""
        status = (self.root / self.names[index]).stat()
        return status.st_size, status.st_mtime_ns
