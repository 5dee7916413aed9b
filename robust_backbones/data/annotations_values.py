"""Values of annotations: validity of numbers, names, boxes, areas and masks, and the extent of masks."""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

from pycocotools import mask as mask_tools

Row = dict[str, Any]
FLAT = "its polygons enclose nothing"
"""The fault of a mask of lines and points."""


def is_number(value: Any, most: float = 1e7) -> bool:
    # NaN compares false; a 400-digit integer compares without becoming a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -most < value < most


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value, 2**53)


def is_id(value: Any) -> bool:
    # Hashes have 64 bits.
    return (isinstance(value, int) and is_number(value, 2**64)) or (isinstance(value, str) and bool(value))


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_file_name(value: Any) -> bool:
    # Control characters and halves of pairs (surrogates) would break the sentence that names the file.
    return is_text(value) and len(value) < 1000 and not re.search(r"[\x00-\x1f\ud800-\udfff]", value)


def is_side(value: Any) -> bool:
    return is_whole(value) and 0 < value < 1_000_000


def is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) >= 0


def is_area(value: Any) -> bool:
    return is_number(value, 1e10) and value >= 0


def is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def is_odd_area(area: Any, width: Any, height: Any) -> Any:
    """Whether an object's area is impossible for its box, in pixels; for numbers, or arrays of them."""
    # Masks are whole pixels, boxes are not.
    return (width * height > 4) & ((area < 1) | (area > (width + 1) * (height + 1)))


def number_in(text: str | None, *, whole: bool = False) -> Any:
    try:
        return int(text or "") if whole else float(text or "")
    except ValueError:
        return math.nan


# Names


def plain(name: str) -> str:
    """A class name without case, spaces, hyphens and underscores, and with accents in one form."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()


def short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError, TypeError):  # an integer of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


# Masks


def usable_mask(segmentation: Any) -> Any:
    """The mask of a valid object in the form of Detectron2 and pycocotools, or None if it has none.

    Polygons of fewer than three points are left out, because pycocotools would take those of two for boxes. So are
    masks without an area (run lengths without a pixel, points on a line): no detection can match them, and training
    would learn them.
    """
    if isinstance(segmentation, dict):
        return segmentation if segmentation and mask_tools.area(run_lengths(segmentation)) else None
    if not isinstance(segmentation, list):
        return None
    polygons = [polygon for polygon in segmentation if isinstance(polygon, list) and _encloses(polygon)]
    return (segmentation if len(polygons) == len(segmentation) else polygons) or None


def _encloses(polygon: list[float]) -> bool:
    """Whether there are three points or more, and a triangle of the first and two neighbouring ones has an area."""
    if len(polygon) < 6:
        return False
    x, y = polygon[:2]
    pairs = itertools.pairwise(zip(polygon[2::2], polygon[3::2], strict=True))
    return any(abs((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) > 1e-6 for (x1, y1), (x2, y2) in pairs)


def run_lengths(mask: Any, width: int = 0, height: int = 0) -> Any:
    """A usable mask as pycocotools' compressed run lengths; polygons need the image's size."""
    if isinstance(mask, list):
        return mask_tools.merge(mask_tools.frPyObjects(mask, height, width))
    return mask_tools.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask


def mask_area(segmentation: Any, width: int, height: int) -> int:
    """The number of pixels of a valid mask in an image of this size, as counted by pycocotools."""
    return int(mask_tools.area(run_lengths(usable_mask(segmentation), width, height)))


def box_polygon(box: Iterable[float]) -> list[list[float]]:
    """The COCO polygon that fills the box ``(x, y, width, height)``."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def mask_extent(segmentation: Any) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a valid mask; NaN if there is none."""
    mask = usable_mask(segmentation)
    if mask is None:
        return (math.nan,) * 4
    if isinstance(mask, list):
        x, y = [[value for polygon in mask for value in polygon[start::2]] for start in (0, 1)]
        return min(x), min(y), max(x), max(y)
    left, top, width, height = mask_tools.toBbox(run_lengths(mask)).tolist()
    return left, top, left + width, top + height


def mask_problem(segmentation: Any, width: int, height: int) -> tuple[Literal["error", "warning"], str] | None:
    """The fault of an object's mask: an error, or a warning that it has none."""
    if segmentation is not None and not isinstance(segmentation, list | dict):
        return "error", f"segmentation is {short(segmentation)}"
    if isinstance(segmentation, dict) and segmentation:
        problem = _rle_problem(segmentation, width, height)
    else:
        problem = _polygons_problem(segmentation or [], width, height)
    if problem:
        return "error", problem
    if usable_mask(segmentation):
        return None
    lines = isinstance(segmentation, list) and any(isinstance(part, list) and len(part) > 5 for part in segmentation)
    return "warning", FLAT if lines else "it has no usable mask"


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
    if size != [height, width] or not all(map(is_whole, size)):
        return f"its run-length mask has size {short(size)}, its image [{height}, {width}]"
    if isinstance(counts, str):
        runs = _runs_of(counts)
    elif isinstance(counts, list) and all(map(is_whole, counts)):
        runs = counts
    else:
        return f"its run-length mask has counts {short(counts)}"
    if runs is None or min(runs, default=-1) < 0 or sum(runs) != width * height:
        return f"its run-length mask does not cover the {width} x {height} pixels of its image"
    return ""


def _runs_of(text: str) -> list[int] | None:
    """COCO's compressed counts (maskApi.c, rleFrString) as run lengths; None if invalid."""
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


# Spelling


def as_coco_writes(row: Row) -> Row:
    """The annotation with unambiguous deviations from COCO's format converted: numbers in strings, floats in run
    lengths, a bare polygon, polygons of points, ``iscrowd`` without a value, and ``ignore``."""
    new: Row = {}
    box, mask = row.get("bbox"), row.get("segmentation")
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        read = [number_in(value) if isinstance(value, str) else value for value in box]
        new |= {"bbox": read} if is_box(read) else {}
    if isinstance(row.get("area"), str):
        new["area"] = number_in(row["area"])
    if "iscrowd" in row and row["iscrowd"] in (None, "", "0", "1"):
        new["iscrowd"] = int(row["iscrowd"] or 0)
    if row.get("ignore") in (1, "1"):  # neither found nor missed, as a crowd
        new |= {"ignore": 0, "iscrowd": 1}
    if isinstance(mask, dict):
        lists = [value for value in mask.values() if isinstance(value, list)]
        if any(isinstance(value, float) and value.is_integer() for values in lists for value in values):
            new["segmentation"] = {key: _whole(value) for key, value in mask.items()}
    elif isinstance(mask, list) and len(mask) >= 6 and all(map(is_number, mask)):
        new["segmentation"] = [mask]
    elif isinstance(mask, list) and all(isinstance(part, list) and part and all(map(_is_point, part)) for part in mask):
        new |= {"segmentation": [[*itertools.chain(*part)] for part in mask]} if mask else {}
    return new


def _whole(values: Any) -> Any:
    if not isinstance(values, list):
        return values
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
