"""Annotated sets of detection data in COCO's or VOC's layout: checked whole, and repaired."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_backbones.data.annotations import (
    Content,
    Fault,
    Row,
    Use,
    box_polygon,
    check_coco,
    check_voc,
    mask_problem,
    read_json,
    read_voc,
    usable_mask,
)
from robust_backbones.data.annotations_images import check_images, read_headers
from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_json


def datasets_root() -> Path:
    """The folder that Detectron2's built-in data sets are looked for in."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def locate(path: str | Path) -> Path:
    """Where a data set's file or folder is: in ``datasets_root``, else in the working folder; the first if nowhere."""
    path = Path(path).expanduser()
    places = [datasets_root() / path, path.absolute()]
    return next((place for place in places if place.exists()), places[0])


@dataclass(frozen=True)
class AnnotatedSet:
    """Where a set's annotations and images are."""

    annotations: Path
    """COCO's JSON file, or VOC's folder of Annotations, ImageSets and JPEGImages."""
    images: Path
    split: str = ""
    """Of VOC: the list in ImageSets/Main."""
    classes: tuple[str, ...] | None = None
    """Of VOC: the names that objects may have; all where it is None."""

    @classmethod
    def parse(cls, text: str) -> AnnotatedSet:
        """``annotations.json:IMAGES`` of COCO's format, ``FOLDER:LIST`` of VOC's; paths as ``locate`` finds them.

        Raises:
            InputError: it is neither.
        """
        first, colon, second = text.rpartition(":")
        if not (colon and first and second):
            raise InputError(f"{text!r} names no data set: give annotations.json:IMAGE_FOLDER, or VOC_FOLDER:LIST")
        place = locate(first)
        return cls(place, locate(second)) if first.endswith(".json") else cls(place, place / "JPEGImages", second)

    def check(
        self, use: Use | None = None, *, workers: int = 8, cache: Path | None = None
    ) -> tuple[list[Fault], Content]:
        """All faults of annotations and images, errors first, and the content in COCO's format.

        Raises:
            FileNotFoundError: of an annotation file or list.
        """
        if self.split:
            content, faults = read_voc(self.annotations, self.split, self.classes)
            faults = check_voc(self.annotations, content, faults, use)
        else:
            content, faults = read_json(self.annotations)
            faults += check_coco(self.annotations, content, use) if content else []
        rows = content.get("images", [])
        # Image rows that are named already have no size, or no file, to compare with.
        named = {fault.place[1] for fault in faults if fault.place and fault.place[0] == "images"}
        named |= {number for number, row in enumerate(rows) if self.split and _has_error(faults, row["id"])}
        images = [
            (row["id"], str(self.images / row["file_name"]), row["width"], row["height"])
            for number, row in enumerate(rows)
            if number not in named
        ]
        found = check_images(images, workers=workers, cache=cache)
        return sorted([*faults, *found], key=lambda fault: fault.severity), content


def _has_error(faults: Sequence[Fault], image: Any) -> bool:
    return any(fault.image == image and fault.what.startswith("size/") for fault in faults)


def repair(dataset: AnnotatedSet, use: Use, output: Path) -> list[str]:
    """Write a COCO annotation file without its errors to ``output``, and return a list of what was done.

    Broken rows and images are left out, sizes are those of the files, boxes are clipped, with ``use.masks`` a missing
    mask becomes the box, a missing area the box's. What would have to be guessed is not changed.

    Raises:
        InputError: the set is VOC's, its file no COCO file, or ``output`` exists.
    """
    if dataset.split:
        raise InputError(f"{dataset.annotations} is in VOC's format, which --fix does not write: mend its XML files")
    if output.exists():
        raise InputError(f"{output} exists: give another folder to --fix")
    content, faults = read_json(dataset.annotations)
    if not content:
        raise InputError(str(faults[0]))
    done: Counter[str] = Counter()
    images = [row for row in content["images"] if isinstance(row, dict)]
    paths = {number: str(dataset.images / str(row.get("file_name"))) for number, row in enumerate(images)}
    headers = read_headers(list(paths.values()))
    kept_images = []
    for number, row in enumerate(images):
        header = headers.get(paths[number])
        if header is None or header.problem:
            done["images that are missing or cannot be read left out"] += 1
            continue
        if (row.get("width"), row.get("height")) != (header.width, header.height):
            done["sizes of images corrected"] += 1
        kept_images.append({**row, "width": header.width, "height": header.height})
    ids = [row.get("id") for row in kept_images]
    sizes = {str(row.get("id")): (row["width"], row["height"]) for row in kept_images}
    kept = [
        _repaired(row, sizes.get(str(row.get("image_id"))), use, done)
        for row in content["annotations"]
        if isinstance(row, dict)
    ]
    mended = {**content, "images": kept_images, "annotations": kept}
    faults = check_coco(dataset.annotations, mended, use)
    broken = {fault.place for fault in faults if fault.severity == "error" and fault.place}
    for name in ("images", "annotations"):
        rows = mended[name]
        mended[name] = [row for number, row in enumerate(rows) if (name, number) not in broken]
        if count := len(content[name]) - len(mended[name]):
            done[f"{name} left out in all"] += count
    gone = {str(value) for value in ids} - {str(row["id"]) for row in mended["images"]}
    mended["annotations"] = [row for row in mended["annotations"] if str(row["image_id"]) not in gone]
    output.mkdir(parents=True)
    write_json(output / dataset.annotations.name, mended)
    return [f"{count} {what}" for what, count in done.items()]


def _repaired(row: Row, size: tuple[int, int] | None, use: Use, done: Counter[str]) -> Row:
    """The annotation with its box in the image, an area and a mask, where its box says what they are."""
    box = row.get("bbox")
    if size is None or not (isinstance(box, list) and len(box) == 4):
        return row
    if not all(isinstance(value, int | float) and abs(value) < 1e7 for value in box) or min(box[2:]) < 0:
        return row
    low = [min(max(value, 0), side) for value, side in zip(box[:2], size, strict=True)]
    high = [min(max(box[i] + box[i + 2], 0), size[i]) for i in (0, 1)]
    inside = box[0] < size[0] and box[1] < size[1] and box[0] + box[2] > 0 and box[1] + box[3] > 0
    clipped = [*low, high[0] - low[0], high[1] - low[1]]
    if inside and clipped != box and any(abs(a - b) > 1 for a, b in zip(clipped, box, strict=True)):
        row, box = {**row, "bbox": clipped}, clipped
        done["boxes clipped to their images"] += 1
    if "area" not in row:
        row = {**row, "area": box[2] * box[3]}
        done["areas filled in from boxes"] += 1
    problem = mask_problem(row.get("segmentation"), *size) if use.masks else None
    if problem and not usable_mask(None if problem[0] == "error" else row.get("segmentation")):
        row = {**row, "segmentation": box_polygon(box)}
        done["masks filled in from boxes"] += 1
    return row
