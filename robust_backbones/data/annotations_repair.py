"""Repaired copies of annotated sets: what is broken is mended where it says itself what it should be, else left out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from robust_backbones.data.annotations import (
    LAYOUT,
    Content,
    Fault,
    Row,
    Use,
    box_polygon,
    check_coco,
    is_id,
    is_number,
    is_odd_area,
    is_side,
    mask_extent,
    mask_problem,
    plain,
    read_json,
    short,
    usable_mask,
)
from robust_backbones.data.annotations_images import Header, read_headers
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.data.annotations_voc import check_voc, number_in, read_voc, text_in, voc_images, voc_names
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path

Rename = Callable[[str], str]
_GONE = "images that are missing or cannot be read left out"
_SIZES, _CLIPPED = "sizes of images corrected", "boxes clipped to their images"


def renaming(classes: Sequence[str] = (), table: Mapping[str, str] | None = None) -> Rename:
    """What a class is to be called: as ``table`` says, else as the one of ``classes`` that differs in case, spaces,
    hyphens and underscores alone, else what it is."""
    known = {plain(name): name for name in classes}
    if len(known) < len(classes):
        raise InputError(f"classes differ in case and spaces alone: {', '.join(classes)}; leave one of them")

    def rename(name: str) -> str:
        name = (table or {}).get(name, name)
        return name if name in classes else known.get(plain(name), name)

    return rename


def repair(dataset: AnnotatedSet, use: Use, output: Path, rename: Rename = str) -> tuple[AnnotatedSet, list[str]]:
    """Write the annotations without their errors to the folder ``output``; the set there, and a list of what was done.

    Broken rows and images are left out, sizes are those of the files, boxes are clipped, classes renamed. In COCO's
    format a missing or impossible area becomes the box's, with ``use.masks`` a missing mask too, classes of one name
    become one, and annotations are numbered anew where their ids are missing or there twice.
    In VOC's, lines that are there twice go, corners are put in order, and an empty or unspecified ``difficult`` is 0;
    JPEGImages is a link to the images. What would have to be guessed is not changed.

    Raises:
        InputError: the file is no COCO file, VOC's list is not there or names what is not in its folder, boxes look
            like those of another layout, two images or classes share an id, or ``output`` exists.
    """
    if output.exists():
        raise InputError(f"{output} exists: give another folder to --fix")
    done: Counter[str] = Counter()
    if dataset.split:
        _repair_voc(dataset, output, rename, done)
        repaired = replace(dataset, annotations=output, images=output / "JPEGImages")
    else:
        _repair_coco(dataset, use, output, rename, done)
        repaired = replace(dataset, annotations=output / dataset.annotations.name)
    return repaired, [f"{count} {what}" for what, count in done.items() if count]


# COCO


def _repair_coco(dataset: AnnotatedSet, use: Use, output: Path, rename: Rename, done: Counter[str]) -> None:
    content, faults = read_json(dataset.annotations)
    if not content:
        raise InputError(str(faults[0]))
    _make_numbers(content, done)
    _refuse_shared_ids(dataset.annotations, content)
    _number_annotations(content, done)
    categories, ids = _repaired_classes(content["categories"], rename, done)
    images = [row for row in content["images"] if isinstance(row, dict)]
    for row in images:
        name, folders = str(row.get("file_name")), str(row.get("file_name")).replace("\\", "/")
        if name != folders and not os.path.exists(dataset.images / name) and os.path.exists(dataset.images / folders):
            row["file_name"] = folders
            done["names of files written with / between folders"] += 1
    paths = {number: str(dataset.images / str(row.get("file_name"))) for number, row in enumerate(images)}
    headers = read_headers(list(paths.values()))
    kept_images = []
    for number, row in enumerate(images):
        header = headers.get(paths[number])
        if header is None or header.problem:
            done[_GONE] += 1
            continue
        given = row.get("width"), row.get("height")
        if given != (header.width, header.height) and not _is_resized(*given, header):
            row = {**row, "width": header.width, "height": header.height}
            done[_SIZES] += 1
        kept_images.append(row)
    _refuse_layout(check_coco(dataset.annotations, {**content, "images": kept_images}))
    sizes = {str(row.get("id")): (row["width"], row["height"]) for row in kept_images}
    kept = [
        _repaired(row, sizes.get(str(row.get("image_id"))), use, ids, done)
        for row in content["annotations"]
        if isinstance(row, dict)
    ]
    mended = {**content, "categories": categories, "images": kept_images, "annotations": kept}
    faults = check_coco(dataset.annotations, mended, use)
    broken = {fault.place for fault in faults if fault.severity == "error" and fault.place}
    mended |= {
        name: [row for number, row in enumerate(mended[name]) if (name, number) not in broken]
        for name in ("images", "annotations", "categories")
    }
    left = {str(row.get("id")) for row in mended["images"]}
    mended["annotations"] = [row for row in mended["annotations"] if str(row["image_id"]) in left]
    for name in ("images", "annotations"):
        done[f"{name} left out in all"] += len(content[name]) - len(mended[name])
    output.mkdir(parents=True)
    with atomic_path(output / dataset.annotations.name) as temporary:  # an indent would make it twice as large
        temporary.write_text(json.dumps(mended))


def _is_resized(width: Any, height: Any, header: Header) -> bool:
    """Whether an image's size is the annotated one by a factor: then its boxes are of the latter, and stay so."""
    if not (is_side(width) and is_side(height)) or width == header.width or height == header.height:
        return False
    return abs(width * header.height - height * header.width) <= max(width, height, header.width, header.height)


def _refuse_layout(faults: Iterable[Fault]) -> None:
    """Boxes of another layout would look sound once they are clipped or their corners are put in order."""
    if guess := next((fault for fault in faults if fault.kind == LAYOUT), None):
        raise InputError(str(guess))


def _make_numbers(content: Content, done: Counter[str]) -> None:
    """Ids of classes and, where those of the images are numbers, of images: what is written as ``"7"`` or ``7.0``."""
    images = [row.get("id") for row in content["images"] if isinstance(row, dict)]
    of_images = ["image_id", "id"] if not all(isinstance(value, str) for value in images) else []
    keys = {"categories": ["id"], "images": of_images[1:], "annotations": ["category_id", *of_images[:1]]}
    for name, names in keys.items():
        for row in content[name]:
            for key in names if isinstance(row, dict) else ():
                text = str(row.get(key)).removesuffix(".0")
                if not isinstance(row.get(key), int) and text.isascii() and text.isdigit() and len(text) < 16:
                    row[key] = int(text)
                    done["ids made whole numbers"] += 1


def _refuse_shared_ids(file: Path, content: Content) -> None:
    """Nothing says whose the objects of two images, or classes, of one id are."""
    for name, key in (("images", "file_name"), ("categories", "name")):
        seen: dict[Any, Any] = {}
        for row in content[name]:
            if isinstance(row, dict) and is_id(row.get("id")):
                other = seen.setdefault(row["id"], row.get(key))
                if other != row.get(key):
                    what = f"{short(other)} and {short(row.get(key))} are {name} of the one id {short(row['id'])}"
                    raise InputError(f"{file}: {what}: give one of them, and its objects, another id")


def _number_annotations(content: Content, done: Counter[str]) -> None:
    """Nothing else names annotations by their ids: those that are missing, or there twice, lose no object."""
    rows = [row for row in content["annotations"] if isinstance(row, dict)]
    ids = [row.get("id") for row in rows]
    if not all(map(is_id, ids)) or len(set(ids)) < len(ids):
        for number, row in enumerate(rows, 1):
            row["id"] = number
        done["annotations numbered anew"] += len(rows)


def _repaired_classes(rows: Iterable[Any], rename: Rename, done: Counter[str]) -> tuple[list[Row], dict[Any, Any]]:
    """Categories with their new names, and the id of the one that each other of its name is now."""
    kept: dict[str, Row] = {}
    broken, ids = [], {}
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("id"), int)):
            broken.append(row)
            continue
        name = rename(row["name"])
        done["classes renamed"] += name != row["name"]
        if name in kept and kept[name]["id"] != row["id"]:
            ids[row["id"]] = kept[name]["id"]
            done["classes of one name made one"] += 1
        else:
            kept[name] = {**row, "name": name}
    return [*kept.values(), *broken], ids


def _repaired(row: Row, size: tuple[int, int] | None, use: Use, ids: Mapping[Any, Any], done: Counter[str]) -> Row:
    """The annotation with its box in the image, an area and a mask, where its box says what they are."""
    if isinstance(row.get("category_id"), int) and row["category_id"] in ids:
        row = {**row, "category_id": ids[row["category_id"]]}
    box = row.get("bbox")
    problem = mask_problem(row.get("segmentation"), *size) if size and (use.masks or not box) else None
    if size and not box and not problem:
        x1, y1, x2, y2 = mask_extent(row.get("segmentation"))
        row = {**row, "bbox": (box := [x1, y1, x2 - x1, y2 - y1])}
        done["boxes filled in from masks"] += 1
    if size is None or not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0):
        return row
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    x1, y1, x2, y2 = clipped = _clipped(corners, size)
    if clipped != corners:
        row, box = {**row, "bbox": [x1, y1, x2 - x1, y2 - y1]}, [x1, y1, x2 - x1, y2 - y1]
        done[_CLIPPED] += 1
    area = row.get("area")
    if area is None or (is_number(area, 1e10) and is_odd_area(area, *box[2:])):
        row = {**row, "area": box[2] * box[3]}
        done["areas filled in from boxes"] += 1
    if use.masks and problem and not usable_mask(None if problem[0] == "error" else row.get("segmentation")):
        row = {**row, "segmentation": box_polygon(box)}
        done["masks filled in from boxes"] += 1
    return row


def _clipped(corners: list[float], size: tuple[int, int]) -> list[float]:
    """(x1, y1, x2, y2) within the image, if they leave it by more than a pixel and are not outside."""
    x1, y1, x2, y2 = corners
    low, high = min(x1, y1), max(x2 - size[0], y2 - size[1])
    if x1 >= size[0] or y1 >= size[1] or x2 <= 0 or y2 <= 0 or (low >= -1 and high <= 1):
        return corners
    return [max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])]


# VOC


def _repair_voc(dataset: AnnotatedSet, output: Path, rename: Rename, done: Counter[str]) -> None:
    listed = dataset.annotations / f"ImageSets/Main/{dataset.split}.txt"
    annotations = dataset.annotations / "Annotations"
    try:
        names = voc_names(listed, annotations)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listed} cannot be read ({getattr(error, 'strerror', error)}): check the path") from None
    if outside := next((name for name in names if os.path.isabs(name) or ".." in Path(name).parts), None):
        raise InputError(f"{listed} names {outside}, which is not in {annotations}: list images by their names there")
    content, faults = read_voc(dataset.annotations, dataset.split, dataset.classes)
    _refuse_layout(check_voc(dataset.annotations, content, faults))
    done["lines of the list that were there twice left out"] += len(names) - len(set(names))
    files = voc_images(dataset.images)
    paths = {name: str(dataset.images / files.get(name, f"{name}.jpg")) for name in dict.fromkeys(names)}
    headers = read_headers(paths.values())
    kept = []
    for name, path in paths.items():
        header = headers.get(path)
        if header is None or header.problem:
            done[_GONE] += 1
            continue
        try:
            root = ElementTree.fromstring((annotations / f"{name}.xml").read_bytes())
        except (OSError, ElementTree.ParseError, ValueError, RecursionError):
            done["images whose annotation is missing or no XML left out"] += 1
            continue
        _repair_xml(root, header, dataset.classes, rename, done)
        with atomic_path(output / f"Annotations/{name}.xml", durable=False) as temporary:
            ElementTree.ElementTree(root).write(temporary, encoding="utf-8")
        kept.append(name)
    place = output / "ImageSets/Main"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{dataset.split}.txt").write_text("".join(f"{name}\n" for name in kept), "utf-8")
    (output / "JPEGImages").symlink_to(dataset.images.absolute(), target_is_directory=True)


def _repair_xml(
    root: ElementTree.Element, header: Header, classes: Sequence[str] | None, rename: Rename, done: Counter[str]
) -> None:
    """Mend an image's annotation in place."""
    sides = {"width": header.width, "height": header.height}
    width, height = (number_in(root.findtext(f"size/{side}"), whole=True) for side in sides)
    if (width, height) != (header.width, header.height) and not _is_resized(width, height, header):
        for size in root.findall("size"):
            root.remove(size)
        size = ElementTree.SubElement(root, "size")
        for side, value in sides.items():
            ElementTree.SubElement(size, side).text = str(value)
        done[_SIZES] += 1
    for above, thing in [(element, thing) for element in root.iter() for thing in element.findall("object")]:
        name, difficult, text = thing.find("name"), thing.find("difficult"), text_in(thing, "name")
        if name is not None and text:
            name.text = rename(text)
            done["objects of classes renamed"] += name.text != text
        if difficult is not None and text_in(thing, "difficult") in ("", "Unspecified"):
            difficult.text = "0"
            done["values of difficult set to 0"] += 1
        known = bool(text) and (classes is None or text_in(thing, "name") in classes)
        sound = text_in(thing, "difficult", "0") in ("0", "1")
        if not (known and sound and _repair_corners(thing, (header.width, header.height), done)):
            above.remove(thing)
            done["objects left out"] += 1


def _repair_corners(thing: ElementTree.Element, size: tuple[int, int], done: Counter[str]) -> bool:
    """Whether the object's box, mended in place, can be used; VOC counts pixels from 1, the last of a box included."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    boxes = thing.findall("bndbox")
    values = [number_in(thing.findtext(f"bndbox/{key}")) for key in keys]
    if len(boxes) != 1 or not all(map(is_number, values)):
        return False
    x1, y1, x2, y2 = [*map(min, values[:2], values[2:]), *map(max, values[:2], values[2:])]
    done["corners of boxes put in order"] += [x1, y1, x2, y2] != values
    clipped = _clipped([x1 - 1, y1 - 1, x2, y2], size)
    done[_CLIPPED] += clipped != [x1 - 1, y1 - 1, x2, y2]
    x1, y1, x2, y2 = clipped[0] + 1, clipped[1] + 1, *clipped[2:]
    if [x1, y1, x2, y2] != values:
        for key, value in zip(keys, (x1, y1, x2, y2), strict=True):
            part = boxes[0].find(key)
            if part is not None:
                part.text = f"{value:g}" if value == int(value) else repr(value)
    return x2 > 0 and y2 > 0 and x1 - 1 < size[0] and y1 - 1 < size[1]
