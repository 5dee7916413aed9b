"""Images in files of their own, as in ImageNet's layout: one folder a class, which has the folder's name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import ImageFolder

from robust_backbones.errors import InputError


@dataclass(frozen=True)
class FolderImages:
    """Files of images and their classes.

    ``scan`` takes the folders in sorted order as classes, images follow class by class; the order is torchvision's.
    """

    root: Path
    classes: list[str]
    labels: list[int]
    names: list[str]
    """Paths relative to ``root``."""

    @classmethod
    def scan(cls, root: Path) -> FolderImages:
        """List the images without opening them.

        Raises:
            InputError: a class folder holds no image.
        """
        try:
            listing = ImageFolder(str(root))
        except FileNotFoundError as error:  # torchvision says which classes are empty, in several lines
            raise InputError(f"cannot use {root}: {str(error).splitlines()[0].rstrip('. ')}; add or remove") from None
        names = [os.path.relpath(path, root) for path, _ in listing.samples]
        return cls(root, listing.classes, listing.targets, names)

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def stamp(self, index: int) -> tuple[int, ...]:
        """Size in bytes and time of change in ns."""
        status = (self.root / self.names[index]).stat()
        return status.st_size, status.st_mtime_ns
