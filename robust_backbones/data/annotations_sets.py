"""Annotated sets of detection data in COCO's or VOC's layout, and their complete check."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_backbones.data.annotations import Content, Fault, Use, check_coco, read_json
from robust_backbones.data.annotations_images import check_images
from robust_backbones.data.annotations_values import is_file_name, is_id
from robust_backbones.data.annotations_voc import check_voc, read_voc, voc_names
from robust_backbones.errors import InputError


def datasets_root() -> Path:
    """The folder of Detectron2's built-in data sets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def locate(path: str | Path) -> Path:
    """The path of a data set's file or folder: in ``datasets_root``, else in the working folder.

    If it does not exist, the place that the user probably meant: the former if DETECTRON2_DATASETS is set.
    """
    path = Path(path).expanduser()
    places = [datasets_root() / path, path.absolute()]
    return next((place for place in places if place.exists()), places["DETECTRON2_DATASETS" not in os.environ])


def parts_of(text: str) -> tuple[str, str, bool]:
    """``FIRST:SECOND`` of a set, and whether it is annotations.json:IMAGES, of COCO's format, or VOC_FOLDER:LIST.

    Raises:
        InputError: it is neither.
    """
    first, colon, second = text.rpartition(":")
    is_coco = first.lower().endswith(".json")
    if (
        not (colon and first and second)
        or second.lower().endswith(".json")
        or (not is_coco and locate(first).is_file())
    ):
        raise InputError(f"{text!r} names no data set: give NAME=annotations.json:IMAGES, or NAME=VOC_FOLDER:LIST")
    return first, second, is_coco


@dataclass(frozen=True)
class AnnotatedSet:
    """The paths of a set's annotations and images."""

    annotations: Path
    """COCO's JSON file, or VOC's folder of Annotations, ImageSets and JPEGImages."""
    images: Path
    split: str = ""
    """Of VOC: the list in ImageSets/Main."""
    classes: tuple[str, ...] | None = None
    """Of VOC: the names that objects may have; None: all."""

    @classmethod
    def parse(cls, text: str) -> AnnotatedSet:
        """``annotations.json:IMAGES`` of COCO's format, ``FOLDER:LIST`` of VOC's; paths as found by ``locate``.

        With or without ``NAME=`` in front, as in ``train``.

        Raises:
            InputError: it is neither.
        """
        _, equals, place = text.partition("=")
        if not equals or locate(text.rpartition(":")[0]).exists():  # a path may have a =
            place = text
        first, second, is_coco = parts_of(place)
        folder = locate(first)
        return cls(folder, locate(second)) if is_coco else cls(folder, folder / "JPEGImages", second)

    def digest(self) -> str:
        """SHA-256 of the annotation file, or of the list and its images' XML files; empty if one cannot be read."""
        digest = hashlib.sha256()
        try:
            files = [self.annotations]
            if self.split:
                listed = self.annotations / "ImageSets/Main" / f"{self.split}.txt"
                folder = self.annotations / "Annotations"
                files = [listed, *(folder / f"{name}.xml" for name in voc_names(listed, folder))]
            for path in files:
                digest.update(path.read_bytes())
        except (OSError, UnicodeDecodeError):
            return ""
        return digest.hexdigest()

    def read(self) -> tuple[Content, list[Fault]]:
        """The content in COCO's format, ``{}`` if it cannot be read, and the faults of its files.

        Raises:
            FileNotFoundError: of an annotation file or list.
        """
        return read_voc(self.annotations, self.split, self.classes) if self.split else read_json(self.annotations)

    def image_files(self, content: Content) -> list[tuple[str, dict[str, Any]]]:
        """Path and row of each image in ``content``, without rows that lack a name or an id: the check names those."""
        return [
            (str(self.images / row["file_name"]), row)
            for row in content.get("images", [])
            if isinstance(row, dict) and is_file_name(row.get("file_name")) and is_id(row.get("id"))
        ]

    def check(
        self, use: Use | None = None, *, workers: int = 8, cache: Path | None = None
    ) -> tuple[list[Fault], Content]:
        """All faults of annotations and images, errors first, and the content in COCO's format.

        Raises:
            FileNotFoundError: of an annotation file or list.
        """
        content, faults = self.read()
        if self.split:
            faults = check_voc(self.annotations, content, faults, use)
        elif content:
            faults += check_coco(self.annotations, content, use)
        rows = content.get("images", [])
        # Image rows with an error have no size, or no file, to compare with.
        broken = (fault.place for fault in faults if fault.place and fault.severity == "error")
        named = {number for part, number in broken if part == "images"}
        unsized = {fault.image for fault in faults if self.split and fault.what.startswith("size/")}
        named |= {number for number, row in enumerate(rows) if unsized and row["id"] in unsized}
        images = [
            (row["id"], str(self.images / row["file_name"]), row["width"], row["height"])
            for number, row in enumerate(rows)
            if number not in named
        ]
        found = check_images(images, workers=workers, cache=cache)
        return sorted([*faults, *found], key=lambda fault: fault.severity), content
