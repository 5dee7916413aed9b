"""Annotations of detection data in COCO's format: read, and every fault in them named with its place."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

Row = dict[str, Any]
Content = dict[str, Any]
"""COCO's annotation file: lists of ``images``, ``annotations`` and ``categories``."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set; its text is one sentence that says where, what, and how to mend it."""

    severity: Literal["error", "warning"]
    file: str
    what: str
    mend: str
    image: int | str | None = None
    annotation: int | str | None = None
    place: tuple[str, int] | None = field(default=None, repr=False)
    """The list of the annotation file, and the row in it."""
    kind: str = field(default="", repr=False)
    """Of a warning: what it is counted as."""

    def __str__(self) -> str:
        ids = {"image": self.image, "annotation": self.annotation}
        where = ", ".join([self.file, *(f"{name} {value}" for name, value in ids.items() if value is not None)])
        return f"{where}: {self.what}: {self.mend}"


@dataclass(frozen=True)
class Use:
    """What a set is for; some faults matter to one use alone."""

    training: bool = True
    evaluation: bool = True
    masks: bool = False


# Values of rows


def is_number(value: Any, most: float = 1e7) -> bool:
    # NaN compares false; a 400-digit integer compares without becoming a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -most < value < most


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value, 2**53)


def is_id(value: Any) -> bool:
    # Hashes have 64 bits.
    return (isinstance(value, int) and is_number(value, 2**64)) or (isinstance(value, str) and bool(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_file_name(value: Any) -> bool:
    # Control characters and halves of pairs (surrogates) would break the sentence that names the file.
    return _is_text(value) and len(value) < 1000 and not re.search(r"[\x00-\x1f\ud800-\udfff]", value)


def is_side(value: Any) -> bool:
    return _is_whole(value) and 0 < value < 1_000_000


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def is_odd_area(area: Any, width: Any, height: Any) -> Any:
    """Whether an object's area cannot be that of what its box encloses, in pixels; of numbers, or arrays of them."""
    # Masks are whole pixels, boxes are not.
    return (width * height > 4) & ((area < 1) | (area > (width + 1) * (height + 1)))


_Test = Callable[[Any], bool]
_ID = "a whole number below 2^64, or a text"
_SIDE = "a whole number of pixels, which check-data --fix reads from the file"
_KEYS: dict[str, dict[str, tuple[_Test, str]]] = {
    "categories": {"id": (_is_whole, "a whole number"), "name": (_is_text, "a name")},
    "images": {
        "id": (is_id, _ID),
        "file_name": (is_file_name, "a file's name, of at most 999 characters and without line breaks"),
        "width": (is_side, _SIDE),
        "height": (is_side, _SIDE),
    },
    "annotations": {
        "id": (is_id, _ID),
        "image_id": (is_id, _ID),
        "category_id": (_is_whole, "a whole number"),
        "bbox": (_is_box, "four finite numbers (x, y, width, height), with sides of at least 0"),
        "area": (lambda value: is_number(value, 1e10) and value >= 0, "a number of at least 0 and below 1e10"),
        "iscrowd": (_is_flag, "0 or 1"),
        "ignore": (lambda value: value == 0, 'left out or 0 (use "iscrowd": 1 for regions that do not count)'),
    },
}
"""List -> key -> the test of its value, and what the value has to be."""
_OPTIONAL = ("iscrowd", "ignore")
MISSING = "is not there"
"""What is wrong with a file that does not exist."""
NO_AREA, LEAVES = "boxes without area", "boxes that leave their image"
"""Kinds of warnings."""
LAYOUT = "boxes of another layout"
"""The kind of the error of a set whose boxes are not what the format says; nobody but its maker knows what they are."""


def read_json(file: str | Path) -> tuple[Content, list[Fault]]:
    """A COCO annotation file, ``{}`` where it is none, and what keeps it from being one.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        return {}, [Fault("error", str(file), f"cannot be read ({type(error).__name__}: {told})", _WRITE_COCO)]
    if not isinstance(content, dict):
        return {}, [Fault("error", str(file), f"is a {type(content).__name__}, no object", _WRITE_COCO)]
    faults = [
        Fault("error", str(file), f"has no list {name!r}", _WRITE_COCO)
        for name in _KEYS
        if not isinstance(content.get(name), list)
    ]
    return ({} if faults else content), faults


_WRITE_COCO = "write it in COCO's format, with lists of images, annotations and categories"


def check_coco(file: str | Path, content: Content, use: Use | None = None) -> list[Fault]:
    """All faults of a COCO annotation file's content, errors first."""
    use = use or Use()
    faults: list[Fault] = []
    sound: dict[str, list[tuple[int, Row]]] = {}
    for name, keys in _KEYS.items():
        sound[name] = []
        for place, row in enumerate(content[name]):
            found = [*_faults_of_row(str(file), name, place, row, keys, use)]
            faults += found
            if not any(fault.severity == "error" for fault in found):
                sound[name].append((place, row))
    faults += _faults_of_sets(str(file), content, sound)
    faults += _faults_of_objects(str(file), sound, use)
    return sorted(faults, key=lambda fault: fault.severity)


def _fault(
    severity: Literal["error", "warning"], file: str, name: str, place: int, what: str, mend: str, kind: str = ""
) -> Any:
    """A maker of the fault for a row, whose ids it takes."""

    def make(row: Any) -> Fault:
        row = row if isinstance(row, dict) else {}
        image = row.get("image_id") if name == "annotations" else row.get("id") if name == "images" else None
        annotation = row.get("id") if name == "annotations" else None
        ids = [value if is_id(value) else None for value in (image, annotation)]
        where = f"{file}, row {place} of {name}" if ids == [None, None] else file
        return Fault(severity, where, what, mend, ids[0], ids[1], (name, place), kind)

    return make


def _faults_of_row(
    file: str, name: str, place: int, row: Any, keys: dict[str, tuple[_Test, str]], use: Use
) -> Iterator[Fault]:
    if not isinstance(row, dict):
        yield _fault("error", file, name, place, f"is {short(row)}", "write an object with its keys")(row)
        return
    for key, (test, wanted) in keys.items():
        if (key in _OPTIONAL and key not in row) or (key in row and test(row[key])):
            continue
        # COCO's AP needs areas, training does not.
        severity: Literal["error", "warning"] = "warning" if key == "area" and not use.evaluation else "error"
        what = f"{key} is {short(row[key])}" if key in row else f"{key} is missing"
        yield _fault(severity, file, name, place, what, f"it has to be {wanted}", f"objects without {key}")(row)


def plain(name: str) -> str:
    """A class's name without case, spaces, hyphens and underscores, and with accents in one form."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()


def short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError, TypeError):  # an integer of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _faults_of_sets(file: str, content: Content, sound: dict[str, list[tuple[int, Row]]]) -> Iterator[Fault]:
    """What no row shows alone: values that have to be unique, and rows that name others."""
    for name, key, severity in (
        ("categories", "id", "error"),
        ("categories", "name", "error"),
        ("images", "id", "error"),
        ("images", "file_name", "warning"),
        ("annotations", "id", "error"),
    ):
        seen: set[Any] = set()
        for place, row in sound[name]:
            value = os.path.normpath(row[key]) if key == "file_name" else row[key]
            if value in seen:
                what = f"{key} {short(row[key])} is that of another row of {name} too"
                kind, mend = "images of the same file", "leave or rename one of them"
                if name == "annotations":
                    mend = "number them anew, as check-data --fix does"
                yield _fault(severity, file, name, place, what, mend, kind)(row)  # type: ignore[arg-type]
            seen.add(value)
    names: dict[str, str] = {}
    for place, row in sound["categories"]:
        if (other := names.setdefault(plain(row["name"]), row["name"])) != row["name"]:
            what = f"name {short(row['name'])} is {short(other)} but for case, spaces, - and _"
            mend = "if both are one class, give check-data --fix OUT --rename OLD=NEW"
            yield _fault("warning", file, "categories", place, what, mend, "classes of nearly the same name")(row)
    if len({type(row["id"]) for _, row in sound["images"]}) > 1:
        yield Fault("error", file, "some ids of images are numbers and others texts", "use one kind")
    known = {
        "image_id": {row.get("id") for row in content["images"] if isinstance(row, dict) and is_id(row.get("id"))},
        "category_id": {row["id"] for _, row in sound["categories"]},
    }
    written = {key: {str(number): number for number in numbers} for key, numbers in known.items()}
    kept, things = [], set[tuple[Any, ...]]()
    for place, row in sound["annotations"]:
        missing = [key for key in known if row[key] not in known[key]]
        for key in missing:
            what, mend = f"{key} {short(row[key])} does not exist in the file", "remove it, or add what it names"
            if (twin := written[key].get(str(row[key]))) is not None:
                mend = f"write {short(twin)}, as the id is there"
            yield _fault("error", file, "annotations", place, what, mend)(row)
        if not missing:
            kept.append((place, row))
            thing = (row["image_id"], row["category_id"], *row["bbox"])
            if thing in things:
                what, kind = (
                    "its box and class are those of another object of the image",
                    "objects that are there twice",
                )
                yield _fault("warning", file, "annotations", place, what, "leave one of them", kind)(row)
            things.add(thing)
    sound["annotations"][:] = kept


def _faults_of_objects(file: str, sound: dict[str, list[tuple[int, Row]]], use: Use) -> Iterator[Fault]:
    """Boxes and masks against their images."""
    sizes = {row["id"]: (row["width"], row["height"]) for _, row in sound["images"]}
    rows = [(place, row) for place, row in sound["annotations"] if row["image_id"] in sizes]
    if not any(not row.get("iscrowd") for _, row in rows):
        yield Fault("error", file, "holds no annotated object that is not a crowd", "annotate objects, or leave it out")
        return
    crowds = sum(bool(row.get("iscrowd")) for _, row in rows)
    if crowds > len(rows) / 2:
        what = f"{crowds} of its {len(rows)} objects are crowds, which training drops and AP leaves out"
        mend = 'write "iscrowd": 0 for single objects (some programs write 1 for every mask of run lengths)'
        yield Fault("warning", file, what, mend, kind="files of more crowds than other objects")
    boxes = np.array([row["bbox"] for _, row in rows], np.float64)
    sides = np.array([sizes[row["image_id"]] for _, row in rows], np.float64)
    if guess := _guess_of_boxes(boxes, sides):
        yield Fault("error", file, *guess, kind=LAYOUT)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    if len(rows) > 9 and (high <= sides / 2 + 1).all():
        what = f"all its {len(rows)} boxes lie in the upper left quarter of their images"
        mend = "if they are percents, or of smaller images, write them in pixels of these"
        yield Fault("warning", file, what, mend, kind="files of boxes in one quarter of the images")
    empty = (boxes[:, 2:] == 0).any(1)
    away = ~empty & ((low >= sides).any(1) | (high <= 0).any(1))
    leaves = ~away & ((low < -1).any(1) | (high > sides + 1).any(1))  # a pixel is the rounding of annotations
    areas = np.array([row["area"] for _, row in rows] if use.evaluation else boxes[:, 2:].prod(1), np.float64)
    for found, kind, what, mend in (
        (
            is_odd_area(areas, boxes[:, 2], boxes[:, 3]),
            "areas that do not fit their boxes",
            "its area is less than a pixel, or larger than its box",
            "write it in pixels; AP by size uses it",
        ),
        (empty, NO_AREA, "its box has no area", "training drops it; remove it, or mend its box"),
        (away, "", "its box lies outside its image", "remove it, or mend its box"),
        (leaves, LEAVES, "its box leaves its image by more than a pixel", "training clips it; mend it"),
    ):
        for index in np.flatnonzero(found):
            place, row = rows[index]
            yield _fault("warning" if kind else "error", file, "annotations", place, what, mend, kind)(row)
    if empty.all():
        yield Fault("error", file, "no box has any area", "mend the annotations")
    shown = {row["category_id"] for _, row in rows}
    for place, row in sound["categories"] if use.training else ():
        if row["id"] not in shown:
            what, kind = f"no object is of the class {short(row['name'])}", "classes without an object"
            yield _fault("warning", file, "categories", place, what, "training cannot learn it; annotate some", kind)(
                row
            )
    if not use.masks:
        return
    problems = [mask_problem(row.get("segmentation"), *sizes[row["image_id"]]) for _, row in rows]
    if all(problem is not None and problem[0] == "warning" for problem in problems):
        mend = "give MODEL.MASK_ON False (check-data: no --masks)"
        yield Fault("error", file, f"none of its {len(rows)} objects has a usable mask", mend)
        return
    for (place, row), problem in zip(rows, problems, strict=True):
        if problem is not None:
            severity, what = problem
            mend = "remove or mend it, or give MODEL.MASK_ON False, or let check-data --fix fill its box"
            if severity == "warning" and use.training and not row.get("iscrowd"):
                severity = "error"
            yield _fault(severity, file, "annotations", place, what, mend, "objects without a usable mask")(row)
    # A crowd's mask says where nothing counts, whatever its box.
    masks = [
        None if problem or row.get("iscrowd") else row.get("segmentation")
        for (_, row), problem in zip(rows, problems, strict=True)
    ]
    lowest, highest = np.array([*map(mask_extent, masks)]).reshape(-1, 2, 2).transpose(1, 0, 2)
    shared = (np.minimum(high, highest) - np.maximum(low, lowest)).clip(0).prod(1)
    total = (highest - lowest).prod(1) + (high - low).prod(1) - shared
    for index in np.flatnonzero(~empty & (shared < 0.5 * total)):
        place, row = rows[index]
        what, mend = "its mask and its box share less than half of what both cover", "write both in pixels of the image"
        yield _fault("warning", file, "annotations", place, what, mend, "masks that do not fit their boxes")(row)


def _guess_of_boxes(boxes: NDArray[np.float64], sides: NDArray[np.float64]) -> tuple[str, str] | None:
    """What the boxes look like that are not (x, y, width, height) in pixels."""
    # Boxes that lie outside altogether are named one by one.
    leaving = (boxes[:, :2] + boxes[:, 2:] > sides + 1).any(1) & (boxes[:, :2] < sides).all(1)
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2  # were they centres
    what = f"{int(leaving.sum())} of {len(boxes)} boxes leave their image"
    for layout, inside in (
        ("(x1, y1, x2, y2)", (boxes[:, :2] <= boxes[:, 2:]) & (boxes[:, 2:] <= sides + 1)),
        ("(x of the center, y of the center, width, height)", (low >= -1) & (high <= sides + 1)),
    ):
        within = inside.all(1)
        if leaving.mean() > 0.1 and within.mean() > 0.95:
            few = "none does" if within.all() else f"{int((~within).sum())} do"
            return (
                f"{what}, and {few} as {layout}",
                "write bbox as (x, y, width, height), x and y of its upper left corner",
            )
    if leaving.mean() > 0.5:
        return what, "write bbox as (x, y, width, height) in pixels of the image, x and y of its upper left corner"
    if (boxes[:, :2] + boxes[:, 2:] <= 1.01).all() and (sides > 8).all():
        return "every box lies within one pixel, as fractions of an image do", "write boxes in pixels"
    return None


# Masks


def usable_mask(segmentation: Any) -> Any:
    """The mask of an object as Detectron2 and pycocotools take it, or None where there is none.

    Polygons of fewer than three points are left out: pycocotools would take those of two for boxes.
    """
    if isinstance(segmentation, dict):
        return segmentation or None
    if not isinstance(segmentation, list):
        return None
    polygons = [polygon for polygon in segmentation if isinstance(polygon, list) and len(polygon) >= 6]
    return (segmentation if len(polygons) == len(segmentation) else polygons) or None


def box_polygon(box: Iterable[float]) -> list[list[float]]:
    """``(x, y, width, height)`` as COCO's polygon that fills it."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def mask_extent(segmentation: Any) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a mask without a problem; NaN where there is none, zeros of run lengths without a pixel."""
    mask = usable_mask(segmentation)
    if mask is None:
        return (math.nan,) * 4
    if isinstance(mask, list):
        x, y = [[value for polygon in mask for value in polygon[start::2]] for start in (0, 1)]
        return min(x), min(y), max(x), max(y)
    rle = mask if isinstance(mask["counts"], str) else mask_tools.frPyObjects(mask, *mask["size"])
    left, top, width, height = mask_tools.toBbox(rle).tolist()
    return left, top, left + width, top + height


def mask_problem(segmentation: Any, width: int, height: int) -> tuple[Literal["error", "warning"], str] | None:
    """What is wrong with an object's mask: an error, or as a warning that it has none."""
    if segmentation is not None and not isinstance(segmentation, list | dict):
        return "error", f"segmentation is {short(segmentation)}"
    if isinstance(segmentation, dict) and segmentation:
        problem = _rle_problem(segmentation, width, height)
    else:
        problem = _polygons_problem(segmentation or [], width, height)
    if problem:
        return "error", problem
    return None if usable_mask(segmentation) else ("warning", "it has no usable mask")


def _polygons_problem(polygons: list[Any], width: int, height: int) -> str:
    most = 10 * max(width, height)
    if polygons and all(is_number(value) for value in polygons):  # four numbers, as boxes; or one polygon, not nested
        return "" if len(polygons) <= 4 else "segmentation is one list of numbers, not a list of polygons"
    for number, polygon in enumerate(polygons):
        try:
            total, low, high = sum(map(abs, polygon)), min(polygon, default=0), max(polygon, default=0)
        except (TypeError, OverflowError):
            return f"polygon {number} of its segmentation is {short(polygon)}"
        if not total < math.inf or not (-most <= low and high <= most):
            return f"polygon {number} of its segmentation has numbers that are not finite or far outside its image"
        if len(polygon) % 2:
            return f"polygon {number} of its segmentation has {len(polygon)} numbers, no pairs"
        if len(polygon) >= 6:
            x, y = polygon[::2], polygon[1::2]
            if min(x) >= width or min(y) >= height or max(x) <= 0 or max(y) <= 0:
                return f"polygon {number} of its segmentation lies outside its image"
    return ""


def _rle_problem(rle: Row, width: int, height: int) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] or not all(map(_is_whole, size)):
        return f"its run-length mask has size {short(size)}, its image [{height}, {width}]"
    if isinstance(counts, str):
        runs = _runs_of(counts)
    elif isinstance(counts, list) and all(map(_is_whole, counts)):
        runs = counts
    else:
        return f"its run-length mask has counts {short(counts)}"
    if runs is None or min(runs, default=-1) < 0 or sum(runs) != width * height:
        return f"its run-length mask does not cover the {width} x {height} pixels of its image"
    return ""


def _runs_of(text: str) -> list[int] | None:
    """COCO's compressed counts (maskApi.c, rleFrString) as run lengths; None where they are none."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs
