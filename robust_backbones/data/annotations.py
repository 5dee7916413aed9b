"""Reads annotations of detection data in COCO's format, and finds every fault with its location."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robust_backbones.data.annotations_values import (
    FLAT,
    Row,
    is_area,
    is_box,
    is_file_name,
    is_flag,
    is_id,
    is_number,
    is_odd_area,
    is_side,
    is_text,
    is_whole,
    mask_area,
    mask_extent,
    mask_problem,
    plain,
    short,
)

Content = dict[str, Any]
"""COCO's annotation file: lists of ``images``, ``annotations`` and ``categories``."""
Rows = dict[str, list[tuple[int, Row]]]
"""List of the file -> its valid rows, each with its index."""
Sizes = dict[Any, tuple[int, int]]
"""Image -> width and height in pixels."""


@dataclass(frozen=True)
class Fault:
    """A fault of a data set; its text is one sentence that says where it is, what is wrong, and how to fix it."""

    severity: Literal["error", "warning"]
    file: str
    what: str
    mend: str
    image: int | str | None = None
    annotation: int | str | None = None
    place: tuple[str, int] | None = field(default=None, repr=False)
    """The list of the annotation file, and the row in it."""
    kind: str = field(default="", repr=False)
    """Of a warning: the kind that it is counted as."""

    def __str__(self) -> str:
        ids = {"image": self.image, "annotation": self.annotation}
        where = ", ".join([self.file, *(f"{name} {value}" for name, value in ids.items() if value is not None)])
        return f"{where}: {self.what}: {self.mend}"


@dataclass(frozen=True)
class Use:
    """The use of a set; some faults matter to only one use."""

    training: bool = True
    evaluation: bool = True
    masks: bool = False


_Test = Callable[[Any], bool]
_ID = "a whole number below 2^64, or a text"
_SIDE = "a whole number of pixels, which check-data --fix reads from the file"
_KEYS: dict[str, dict[str, tuple[_Test, str]]] = {
    "categories": {"id": (is_whole, "a whole number"), "name": (is_text, "a name")},
    "images": {
        "id": (is_id, _ID),
        "file_name": (is_file_name, "a file's name, of at most 999 characters and without line breaks"),
        "width": (is_side, _SIDE),
        "height": (is_side, _SIDE),
    },
    "annotations": {
        "id": (is_id, _ID),
        "image_id": (is_id, _ID),
        "category_id": (is_whole, "a whole number"),
        "bbox": (is_box, "four finite numbers (x, y, width, height), with sides of at least 0"),
        "area": (is_area, "a number of at least 0 and below 1e10"),
        "iscrowd": (is_flag, "0 or 1"),
        "ignore": (lambda value: value == 0, 'left out or 0 (use "iscrowd": 1 for regions that do not count)'),
    },
}
"""List -> key -> the test of its value, and what the value must be."""
_OPTIONAL = ("iscrowd", "ignore")
MISSING = "is not there"
"""The fault of a file that does not exist."""
_EMPTY, _LEAVES = "boxes without area", "boxes that leave their image"
LAYOUT = "boxes of another layout"
"""The kind of fault of a set whose boxes do not follow the format; only its author knows what they are."""


def read_json(file: str | Path) -> tuple[Content, list[Fault]]:
    """A COCO annotation file, ``{}`` if it is not one, and the reasons.

    Raises:
        FileNotFoundError: there is no such file.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice.extend(key for key, value in pairs if value != row[key])
        return row

    try:
        content = json.loads(Path(file).read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        mend = "copy or export it again, it may be cut off" if isinstance(error, json.JSONDecodeError) else _WRITE_COCO
        return {}, [Fault("error", str(file), f"cannot be read ({type(error).__name__}: {told})", mend)]
    if twice:
        what, mend = f"has the key {short(twice[0])} twice in one object", "leave one: of two, programs read the last"
        return {}, [Fault("error", str(file), what, mend)]
    if not isinstance(content, dict):
        return {}, [Fault("error", str(file), f"is a {type(content).__name__}, no object", _WRITE_COCO)]
    faults = [
        Fault("error", str(file), f"has no list {name!r}", _WRITE_COCO)
        for name in _KEYS
        if not isinstance(content.get(name), list)
    ]
    if content.get("categories") == [] and content.get("annotations"):
        faults.append(Fault("error", str(file), "has no classes", "list each with its id and name under categories"))
    return ({} if faults else content), faults


_WRITE_COCO = "write it in COCO's format, with lists of images, annotations and categories"


def check_coco(file: str | Path, content: Content, use: Use | None = None) -> list[Fault]:
    """All faults of a COCO annotation file's content, errors first."""
    use, file = use or Use(), str(file)
    faults: list[Fault] = []
    sound: Rows = {}
    for name, keys in _KEYS.items():
        sound[name] = []
        for place, row in enumerate(content[name]):
            found = [*_faults_of_row(file, name, place, row, keys, use)]
            faults += found
            if not any(fault.severity == "error" for fault in found):
                sound[name].append((place, row))
    faults += _faults_of_sets(file, content, sound)
    sized = {row["id"] for _, row in sound["images"]}
    if not content["annotations"] or any(row["image_id"] in sized for _, row in sound["annotations"]):
        faults += _faults_of_objects(file, sound, use)
    return sorted(faults, key=lambda fault: fault.severity)


def _fault(file: str, name: str, place: int, row: Any, what: str, mend: str, kind: str = "") -> Fault:
    """The fault of a row, with the row's ids; a warning if it has a kind."""
    row = row if isinstance(row, dict) else {}
    keys = {"annotations": ("image_id", "id"), "images": ("id", "none")}.get(name, ("none", "none"))
    image, annotation = (value if is_id(value := row.get(key)) else None for key in keys)
    where = f"{file}, row {place} of {name}" if image is annotation is None else file
    return Fault("warning" if kind else "error", where, what, mend, image, annotation, (name, place), kind)


def _faults_of_row(
    file: str, name: str, place: int, row: Any, keys: dict[str, tuple[_Test, str]], use: Use
) -> Iterator[Fault]:
    if not isinstance(row, dict):
        yield _fault(file, name, place, row, f"is {short(row)}", "write an object with its keys")
        return
    for key, (test, wanted) in keys.items():
        if (key in _OPTIONAL and key not in row) or (key in row and test(row[key])):
            continue
        # COCO's AP needs areas, training does not.
        kind = "objects without area" if key == "area" and not use.evaluation else ""
        what = f"{key} is {short(row[key])}" if key in row else f"{key} is missing"
        yield _fault(file, name, place, row, what, f"it has to be {wanted}", kind)


def _faults_of_sets(file: str, content: Content, sound: Rows) -> Iterator[Fault]:
    """Faults that no single row shows: values that must be unique, and references to other rows."""
    unique = {"categories": ("id", "name"), "images": ("id", "file_name"), "annotations": ("id",)}
    for name, key in [(name, key) for name, keys in unique.items() for key in keys]:
        mend = "number them anew, as check-data --fix does" if name == "annotations" else "leave or rename one of them"
        kind = "images of the same file" if key == "file_name" else ""
        seen: set[Any] = set()
        for place, row in sound[name]:
            value = os.path.normpath(row[key]) if key == "file_name" else row[key]
            if value in seen:
                what = f"{key} {short(row[key])} is that of another row of {name} too"
                yield _fault(file, name, place, row, what, mend, kind)
            seen.add(value)
    names: dict[str, str] = {}
    for place, row in sound["categories"]:
        if (other := names.setdefault(plain(row["name"]), row["name"])) != row["name"]:
            what = f"name {short(row['name'])} is {short(other)} but for case, spaces, - and _"
            mend = "if both are one class, give check-data --fix OUT --rename OLD=NEW"
            yield _fault(file, "categories", place, row, what, mend, "classes of nearly the same name")
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
            yield _fault(file, "annotations", place, row, what, mend)
        if not missing:
            kept.append((place, row))
            thing = (row["image_id"], row["category_id"], *row["bbox"])
            if thing in things:
                what = "its box and class are those of another object of the image"
                mend = "leave one of them: AP counts the other as missed"
                yield _fault(file, "annotations", place, row, what, mend, "objects that are there twice")
            things.add(thing)
    sound["annotations"][:] = kept


_SINGLE = 'write "iscrowd": 0 for single objects (some programs write 1 for every mask of run lengths)'


def _faults_of_objects(file: str, sound: Rows, use: Use) -> Iterator[Fault]:
    """Boxes and masks against their images."""
    sizes = {row["id"]: (row["width"], row["height"]) for _, row in sound["images"]}
    rows = [(place, row) for place, row in sound["annotations"] if row["image_id"] in sizes]
    if all(row.get("iscrowd") for _, row in rows):
        what, mend = "holds no annotated object that is not a crowd", "annotate objects, or leave it out"
        yield Fault("error", file, what, _SINGLE if rows else mend)
        return
    boxes = np.array([row["bbox"] for _, row in rows], np.float64)
    sides = np.array([sizes[row["image_id"]] for _, row in rows], np.float64)
    areas = np.array([row["area"] for _, row in rows] if use.evaluation else boxes[:, 2:].prod(1), np.float64)
    yield from _faults_of_most(file, [row for _, row in rows], boxes, areas, sizes, use)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    empty = (boxes[:, 2:] == 0).any(1)
    away = ~empty & ((low >= sides).any(1) | (high <= 0).any(1))
    leaves = ~away & ((low < -1).any(1) | (high > sides + 1).any(1))  # a pixel is the rounding of annotations
    for found, kind, what, mend in (
        (
            is_odd_area(areas, boxes[:, 2], boxes[:, 3]),
            "areas that do not fit their boxes",
            "its area is less than a pixel, or larger than its box",
            "write it in pixels; AP by size uses it",
        ),
        (empty, _EMPTY, "its box has no area", "training drops it; remove it, or mend its box"),
        (away, "", "its box lies outside its image", "remove it, or mend its box"),
        (leaves, _LEAVES, "its box leaves its image by more than a pixel", "training clips it; mend it"),
    ):
        for index in np.flatnonzero(found):
            yield _fault(file, "annotations", *rows[index], what, mend, kind)
    if empty.all():
        yield Fault("error", file, "no box has any area", "mend the annotations")
    shown = {row["category_id"] for _, row in rows}
    for place, row in sound["categories"] if use.training else ():
        if row["id"] not in shown:
            what, mend = f"no object is of the class {short(row['name'])}", "training cannot learn it; annotate some"
            yield _fault(file, "categories", place, row, what, mend, "classes without an object")
    if use.masks:
        yield from _faults_of_masks(file, rows, boxes, sizes, use)


def _faults_of_masks(
    file: str, rows: list[tuple[int, Row]], boxes: NDArray[np.float64], sizes: Sizes, use: Use
) -> Iterator[Fault]:
    problems = [mask_problem(row.get("segmentation"), *sizes[row["image_id"]]) for _, row in rows]
    if all(problem is not None and problem[0] == "warning" for problem in problems):
        mend = "give MODEL.MASK_ON False (check-data: no --masks)"
        yield Fault("error", file, f"none of its {len(rows)} objects has a usable mask", mend)
        return
    masks = []
    for (place, row), problem in zip(rows, problems, strict=True):
        # A crowd's mask says where nothing counts, whatever its box.
        masks.append(None if problem or row.get("iscrowd") else row.get("segmentation"))
        if problem is not None:
            severity, what = problem
            mend = "remove or mend it, or give MODEL.MASK_ON False, or let check-data --fix fill its box"
            # COCO's training set has flat ones, as of annotation 918.
            is_error = severity == "error" or (what != FLAT and use.training and not row.get("iscrowd"))
            kind = "" if is_error else "objects without a usable mask"
            yield _fault(file, "annotations", place, row, what, mend, kind)
    for index in np.flatnonzero(_misfits(masks, boxes)):
        what, mend = "its mask and its box share less than half of what both cover", "write both in pixels of the image"
        yield _fault(file, "annotations", *rows[index], what, mend, "masks that do not fit their boxes")


def _misfits(masks: Iterable[Any], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which valid masks with an area overlap their boxes by less than half."""
    return (boxes[:, 2:] > 0).all(1) & (overlaps(masks, boxes) < 0.5)


def overlaps(masks: Iterable[Any], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of boxes with the boxes around valid masks; NaN if there is no mask."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    lowest, highest = np.array([*map(mask_extent, masks)]).reshape(-1, 2, 2).transpose(1, 0, 2)
    shared = (np.minimum(high, highest) - np.maximum(low, lowest)).clip(0).prod(1)
    both = (highest - lowest).prod(1) + (high - low).prod(1) - shared
    return shared / both.clip(1e-9)


def _faults_of_most(
    file: str, rows: list[Row], boxes: NDArray[np.float64], areas: NDArray[np.float64], sizes: Sizes, use: Use
) -> Iterator[Fault]:
    """Faults that show only over many objects: crowds, images without objects, boxes and areas in other units."""
    warn = partial(Fault, "warning", file)
    sides = np.array([sizes[row["image_id"]] for row in rows], np.float64)
    if guess := guess_of_boxes(boxes, sides):
        yield Fault("error", file, *guess, kind=LAYOUT)
    crowds = sum(bool(row.get("iscrowd")) for row in rows)
    if crowds > len(rows) / 2:
        what = f"{crowds} of its {len(rows)} objects are crowds, which training drops and AP leaves out"
        yield warn(what, _SINGLE, kind="files of more crowds than other objects")
    turned = sum(_is_turned(row.get("attributes")) for row in rows)
    if turned:
        what = f"{turned} of its {len(rows)} objects have a rotation among their attributes, which nothing here reads"
        yield warn(what, "write boxes around the objects as they lie", kind="files of rotated boxes")
    bare = len(sizes) - len({row["image_id"] for row in rows})
    if use.evaluation and bare > len(sizes) / 2:
        what = f"{bare} of its {len(sizes)} images have no object"
        mend = "leave those out that are not annotated: on them AP counts every detection as wrong"
        yield warn(what, mend, kind="files of more images without objects than with")
    if len(rows) < 10:
        return
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    if (high <= sides / 2 + 1).all():
        what = f"all its {len(rows)} boxes lie in the upper left quarter of their images"
        mend = "if they are percents, or of smaller images, write them in pixels of these"
        yield warn(what, mend, kind="files of boxes in one quarter of the images")
    beyond = int((high > sides + 0.5).any(1).sum())
    if beyond > 1 and (low >= 1).all() and (high <= sides + 1).all():
        what = f"{beyond} of its {len(rows)} boxes end a pixel beyond their image, and none begins in the first"
        mend = "if it counts pixels from 1, as VOC does, subtract 1 from every x and y"
        yield warn(what, mend, kind="files of boxes that may count pixels from 1")
    larger = int((areas > (boxes[:, 2:] + 1).prod(1)).sum())
    if larger > len(rows) / 2:
        what = f"{larger} of its {len(rows)} areas are larger than their boxes, as if these were of smaller images"
        mend = "write boxes in pixels of these images, or, where they are right, leave out the areas"
        yield warn(what, mend, kind=LAYOUT)
    # Masks tell of all boxes and areas, also where nothing else uses them; a thousand objects are looked at.
    seen = [row for row in rows[:: len(rows) // 1000 + 1] if not row.get("iscrowd") and all(row["bbox"][2:])]
    seen = [row for row in seen if mask_problem(row.get("segmentation"), *sizes[row["image_id"]]) is None]
    if len(seen) < 10:
        return
    masks = [row["segmentation"] for row in seen]
    odd = int(_misfits(masks, np.array([row["bbox"] for row in seen], np.float64)).sum())
    if not use.masks and odd > len(seen) / 2:  # with masks each is told
        what = f"{odd} of {len(seen)} boxes looked at share less than half with their masks"
        yield warn(what, "write both in pixels of the image", kind="files of masks that do not fit their boxes")
    if use.evaluation:
        pixels = [mask_area(mask, *sizes[row["image_id"]]) for mask, row in zip(masks, seen, strict=True)]
        small = sum(2 * row["area"] < area for row, area in zip(seen, pixels, strict=True))
        if small > len(seen) / 2:
            what = f"{small} of {len(seen)} areas looked at are less than half of their masks"
            mend = "write areas in pixels of the image; AP by size uses them"
            yield warn(what, mend, kind="files of areas that do not fit their masks")


def _is_turned(attributes: Any) -> bool:
    """Whether CVAT marks it as rotated; its box is then that of the object before rotation."""
    angle: Any = attributes.get("rotation") if isinstance(attributes, dict) else 0
    return is_number(angle) and bool(angle % 360)


def guess_of_boxes(boxes: NDArray[np.float64], sides: NDArray[np.float64]) -> tuple[str, str] | None:
    """What boxes look like if they are not (x, y, width, height) in pixels."""
    # Boxes that lie outside altogether are named one by one.
    ends = boxes[:, :2] + boxes[:, 2:]
    leaving = (ends > sides + 1).any(1) & (boxes[:, :2] < sides).all(1)
    far = leaving & (ends > 1.05 * sides + 1).any(1)
    some, many_far = leaving.mean() > 0.1, len(boxes) > 9 and far.mean() > 0.1 and (boxes[:, :2] >= -1).all()
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2  # were they centres
    turned = sides[:, ::-1] + 1
    what = f"{int(leaving.sum())} of {len(boxes)} boxes leave their image"
    for layout, suspected, inside, more in (
        ("(x1, y1, x2, y2)", some, (boxes[:, :2] <= boxes[:, 2:]) & (boxes[:, 2:] <= sides + 1), ""),
        ("(x of the center, y of the center, width, height)", some, (low >= -1) & (high <= sides + 1), ""),
        ("(y, x, height, width)", many_far, ends <= turned, ", or exchange width and height of the images"),
        ("(y1, x1, y2, x2)", many_far, (boxes[:, :2] <= boxes[:, 2:]) & (boxes[:, 2:] <= turned), ""),
    ):
        within = inside.all(1)
        if suspected and within.mean() > 0.95:
            few = "none does" if within.all() else f"{int((~within).sum())} do"
            mend = f"write bbox as (x, y, width, height), x and y of its upper left corner{more}"
            return f"{what}, and {few} as {layout}", mend
    if many_far:
        what = f"{int(far.sum())} of {len(boxes)} boxes leave their image by more than a twentieth, right or below"
        return f"{what}, and none left or above, as boxes of larger images do", "write boxes in pixels of these"
    if leaving.mean() > 0.5:
        return what, "write bbox as (x, y, width, height) in pixels of the image, x and y of its upper left corner"
    if (ends <= 1.51).all() and (sides > 8).all():  # x and y may be those of the center
        return "every box lies within one pixel, as fractions of an image do", "write boxes in pixels"
    return None
