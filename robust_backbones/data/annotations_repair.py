"""Repaired copies of annotated sets: faults with an unambiguous fix are fixed, other broken rows are left out."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement, fromstring

import numpy as np

from robust_backbones.data.annotations import (
    LAYOUT,
    Content,
    Fault,
    Use,
    check_coco,
    guess_of_boxes,
    overlaps,
    read_json,
)
from robust_backbones.data.annotations_images import Header, read_headers, spell_names
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.data.annotations_values import (
    Row,
    as_coco_writes,
    box_polygon,
    is_area,
    is_box,
    is_id,
    is_number,
    is_odd_area,
    is_side,
    mask_area,
    mask_extent,
    mask_problem,
    number_in,
    plain,
    short,
)
from robust_backbones.data.annotations_voc import (
    NO_XML,
    check_voc,
    read_voc,
    said_twice,
    spell_tags,
    text_in,
    voc_images,
    voc_name,
    voc_names,
)
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path, write_text

Rename = Callable[[str], str]
Size = tuple[int, int]
Boxes = dict[str, list[list[float]]]
Changes = defaultdict[str, list[Any]]
"""What was done -> what it was done to: annotations by ``_label``, names of images and classes."""
_LABEL = "label of changes.txt"
"""A key of annotations whose ids are new while they are repaired: the id that the file has, and the new one."""
_LEFT_OUT = "left out in all"
_GONE = "images that are missing or cannot be read left out"
_FLAGS = {"": "0", "unspecified": "0", "false": "0", "true": "1"}
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

    Broken rows and images are left out, sizes are taken from the files, boxes are clipped, classes renamed. In COCO's
    format a missing or impossible area becomes the mask's, else the box's, an invalid or empty box the mask's, with
    ``use.masks`` a missing mask the box, classes with the same name are merged, and annotations whose ids are missing
    or duplicated are renumbered. In VOC's, duplicated lines are removed, corners are put in order, and an empty or
    unspecified ``difficult`` is 0; JPEGImages is a link to the images. What would have to be guessed is not changed.
    ``changes.txt`` there lists all changes, with the ids and names concerned.

    Raises:
        InputError: the file is not a COCO file, VOC's list is missing or names files that are not in its folder, no
            image exists, boxes look like another layout's, two images or classes share an id, or ``output`` exists.
    """
    if output.exists():
        raise InputError(f"{output} exists: give another folder to --fix")
    done: Changes = defaultdict(list)
    if dataset.split:
        _repair_voc(dataset, output, rename, done)
        repaired = replace(dataset, annotations=output, images=output / "JPEGImages")
    else:
        _repair_coco(dataset, use, output, rename, done)
        repaired = replace(dataset, annotations=output / dataset.annotations.name)
    told = {f"{what}: {len(things)}": things for what, things in done.items() if things}
    lines = [line for what, things in told.items() for line in (what, *(f"    {thing}" for thing in things))]
    write_text(output / "changes.txt", "".join(f"{line}\n" for line in lines))
    return repaired, [*told]


# COCO


def _repair_coco(dataset: AnnotatedSet, use: Use, output: Path, rename: Rename, done: Changes) -> None:
    content, faults = read_json(dataset.annotations)
    if not content:
        raise InputError(str(faults[0]))
    _make_numbers(content, done)
    _refuse_shared_ids(dataset.annotations, content)
    _number_annotations(content, done)
    for row in content["annotations"]:
        if isinstance(row, dict) and (new := as_coco_writes(row)):
            done["objects written as COCO writes them"].append(_label(row))
            row |= new
    categories, ids = _repaired_classes(content["categories"], rename, done)
    images = [row for row in content["images"] if isinstance(row, dict)]
    done["names of files written as the files are called"] += spell_names(images, dataset.images)
    paths = [str(dataset.images / str(row.get("file_name"))) for row in images]
    headers, boxes = read_headers(paths), _boxes_by_image(content["annotations"])
    wrong = _wrong_sizes(
        (number, (row.get("width"), row.get("height")), headers.get(path), boxes.get(str(row.get("id"))))
        for number, (row, path) in enumerate(zip(images, paths, strict=True))
    )
    kept_images = []
    for number, (row, path) in enumerate(zip(images, paths, strict=True)):
        header = headers.get(path)
        if header is None or header.problem:
            done[_GONE].append(row.get("file_name"))
            done[f"images {_LEFT_OUT}"].append(row.get("file_name"))
            continue
        if number in wrong:
            row = {**row, "width": header.width, "height": header.height}
            done[_SIZES].append(row["file_name"])
        kept_images.append(row)
    _refuse_none(dataset, len(images), done)
    known = {str(row.get("id")): (row["width"], row["height"]) for row in kept_images}
    faults = check_coco(dataset.annotations, {**content, "images": kept_images})
    _refuse_layout(dataset.annotations, faults, boxes, known)
    kept = [
        _repaired(row, known.get(str(row.get("image_id"))), use, ids, done) if isinstance(row, dict) else row
        for row in content["annotations"]
    ]
    mended = {**content, "categories": categories, "images": kept_images, "annotations": kept}
    faults = check_coco(dataset.annotations, mended, use)
    broken = {fault.place: fault.what for fault in faults if fault.severity == "error" and fault.place}
    left: set[str] = set()
    for name, key in (("categories", "name"), ("images", "file_name"), ("annotations", _LABEL)):
        rows = []
        for number, row in enumerate(mended[name]):
            what = broken.get((name, number))
            if what is None and name == "annotations" and str(row["image_id"]) not in left:
                what = "its image is left out"
            if what is None:
                rows.append(row)
            else:
                label = row.get(key, row.get("id")) if isinstance(row, dict) else short(row)
                done[f"{name} {_LEFT_OUT}"].append(f"{label}: {what}")
        mended[name] = rows
        left = {str(row["id"]) for row in rows}
    for row in mended["annotations"]:
        row.pop(_LABEL, None)
    write_text(output / dataset.annotations.name, json.dumps(mended))  # an indent would make it twice as large


def _boxes_by_image(rows: Iterable[Any]) -> Boxes:
    """The valid boxes of images with objects, whatever else of these is broken."""
    boxes: Boxes = {}
    for row in rows:
        if isinstance(row, dict):
            boxes.setdefault(str(row.get("image_id")), []).extend([row["bbox"]] if is_box(row.get("bbox")) else [])
    return boxes


def _wrong_sizes(images: Iterable[tuple[Any, tuple[Any, Any], Header | None, list[list[float]] | None]]) -> set[Any]:
    """The images (key, annotated size, header, boxes) whose annotated size is wrong: their boxes are of the file's.

    Boxes of a resized, stretched or rotated image refer to the former size, which a correction would hide. So boxes
    must leave the annotated size and fit the file's, here or in other images, without any that contradicts.
    """
    wrong, unknown, seen = set[Any](), set[Any](), set[str]()
    for key, (width, height), header, boxes in images:
        sound = is_side(width) and is_side(height)
        if header is None or header.problem or (sound and (width, height) == (header.width, header.height)):
            continue
        if not sound or boxes is None:
            wrong.add(key)
        elif not _is_resized(width, height, header):
            within = [[_ends_in(box, *sides) for sides in ((width, height), header[:2])] for box in boxes]
            found = {name for name, pair in (("former", [True, False]), ("file", [False, True])) if pair in within}
            if found == {"file"} or max(abs(width - header.width), abs(height - header.height)) <= 2:
                wrong.add(key)
            elif not found:
                unknown.add(key)
            seen |= found
    return wrong | unknown if seen == {"file"} else wrong


def _ends_in(box: list[float], width: int, height: int) -> bool:
    # A pixel is the rounding of annotations.
    return box[0] + box[2] <= width + 1 and box[1] + box[3] <= height + 1


def _is_resized(width: Any, height: Any, header: Header) -> bool:
    """Whether an image's size is the annotated one scaled: then its boxes refer to the latter, and are kept."""
    if not (is_side(width) and is_side(height)) or width == header.width or height == header.height:
        return False
    return abs(width * header.height - height * header.width) <= max(width, height, header.width, header.height)


def _refuse_layout(file: Path, faults: Iterable[Fault], boxes: Boxes, sizes: Mapping[str, Size]) -> None:
    """Refuse boxes of another layout, which would look valid once clipped or with their corners in order."""
    if told := next((fault for fault in faults if fault.kind == LAYOUT), None):
        raise InputError(str(told))
    # Also of objects with other errors, which are mended.
    pairs = [(box, sizes[image]) for image, rows in boxes.items() if image in sizes for box in rows]
    if pairs and (guess := guess_of_boxes(*(np.array(part, np.float64) for part in zip(*pairs, strict=True)))):
        raise InputError(f"{file}: {guess[0]}: {guess[1]}")


def _refuse_none(dataset: AnnotatedSet, images: int, done: Changes) -> None:
    """Refuse to write a copy without any image."""
    if images and images == len(done[_GONE]):
        raise InputError(f"no image of {dataset.annotations} is in {dataset.images}, or can be read: check the path")


def _make_numbers(content: Content, done: Changes) -> None:
    """Make ids such as ``"7"`` or ``7.0`` whole numbers: those of classes and, if they are numbers, of images."""
    images = [row.get("id") for row in content["images"] if isinstance(row, dict)]
    images += [row.get("image_id") for row in content["annotations"] if isinstance(row, dict)]
    of_images = ["image_id", "id"] if not all(isinstance(value, str) for value in images) else []
    keys = {"categories": ["id"], "images": of_images[1:], "annotations": ["category_id", *of_images[:1]]}
    for name, names in keys.items():
        for row in content[name]:
            for key in names if isinstance(row, dict) else ():
                value = row.get(key)
                text = str(int(value) if isinstance(value, bool) else value).removesuffix(".0")
                if type(value) is not int and text.isascii() and text.isdigit() and len(text) < 16:
                    done["ids made whole numbers"].append(f"{key} {short(row[key])} of {name}")
                    row[key] = int(text)


def _refuse_shared_ids(file: Path, content: Content) -> None:
    """Refuse images or classes that share an id, because it is unknown whose the objects are."""
    for name, key in (("images", "file_name"), ("categories", "name")):
        seen: dict[Any, Any] = {}
        for row in content[name]:
            if isinstance(row, dict) and is_id(row.get("id")):
                other = seen.setdefault(row["id"], row.get(key))
                if other != row.get(key):
                    what = f"{short(other)} and {short(row.get(key))} are {name} of the one id {short(row['id'])}"
                    raise InputError(f"{file}: {what}: give one of them, and its objects, another id")


def _number_annotations(content: Content, done: Changes) -> None:
    """Renumber missing or duplicated ids of annotations, to which nothing else refers."""
    rows = [row for row in content["annotations"] if isinstance(row, dict)]
    ids = [row.get("id") for row in rows]
    if not all(map(is_id, ids)) or len(set(ids)) < len(ids):
        for number, row in enumerate(rows, 1):
            done["annotations numbered anew"].append(f"{short(row.get('id'))}: {number}")
            row |= {"id": number, _LABEL: f"{short(row.get('id'))} ({number} now)"}


def _label(row: Row) -> Any:
    return row.get(_LABEL, row.get("id"))


def _repaired_classes(rows: Iterable[Any], rename: Rename, done: Changes) -> tuple[list[Row], dict[Any, Any]]:
    """Categories with their new names, and for each duplicate the id of the one that it is merged into."""
    kept: dict[str, Row] = {}
    broken, ids = [], {}
    for row in rows:
        given = row.get("name") if isinstance(row, dict) else None
        if not (isinstance(given, str | int) and isinstance(row.get("id"), int)):
            broken.append(row)
            continue
        name = rename(str(given))  # digits are classes too
        if name != given:
            done["classes renamed"].append(f"{short(given)}: {short(name)}")
        if name in kept and kept[name]["id"] != row["id"]:
            ids[row["id"]] = kept[name]["id"]
            done["classes of one name made one"].append(f"{short(name)}: id {row['id']} is {kept[name]['id']} now")
        else:
            kept[name] = {**row, "name": name}
    return [*kept.values(), *broken], ids


def _repaired(row: Row, size: Size | None, use: Use, ids: Mapping[Any, Any], done: Changes) -> Row:
    """The annotation with its box inside the image, an area and a mask, as far as these determine each other."""
    row = {**row}
    if isinstance(row.get("category_id"), int) and row["category_id"] in ids:
        row["category_id"] = ids[row["category_id"]]
    if size is None:
        return row
    box: Any = row.get("bbox")
    mask = row.get("segmentation")
    problem = mask_problem(mask, *size)
    if problem and isinstance(mask, dict) and mask.get("size") == [*size] and is_box(box):
        turned = {**mask, "size": [size[1], size[0]]}
        # Else it is the mask of the image turned, which lies in the box turned.
        found = overlaps([turned, mask], np.array([box, [*box[1::-1], *box[:1:-1]]], np.float64))
        if not mask_problem(turned, *size) and found[0] >= 0.5 and found[0] > found[1]:
            row["segmentation"], mask, problem = turned, turned, None
            done["run lengths whose size was (width, height)"].append(_label(row))
    if not problem and not (is_box(box) and all(box[2:])):
        x1, y1, x2, y2 = mask_extent(mask)
        row["bbox"] = box = [x1, y1, x2 - x1, y2 - y1]
        done["boxes filled in from masks"].append(_label(row))
    if not is_box(box):
        return row
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    x1, y1, x2, y2 = clipped = _clipped(corners, size)
    if clipped != corners:
        row["bbox"] = box = [x1, y1, x2 - x1, y2 - y1]
        done[_CLIPPED].append(_label(row))
    if not is_area(row.get("area")) or is_odd_area(row["area"], *box[2:]):
        pixels = 0 if problem else mask_area(mask, *size)
        fits = pixels > 0 and not is_odd_area(pixels, *box[2:])
        row["area"] = pixels if fits else box[2] * box[3]
        done[f"areas filled in from {'masks' if fits else 'boxes'}"].append(_label(row))
    if use.masks and problem and all(box[2:]):
        row["segmentation"] = box_polygon(box)
        done["masks filled in from boxes"].append(_label(row))
    return row


def _clipped(corners: list[float], size: Size) -> list[float]:
    """(x1, y1, x2, y2) clipped to the image, if they extend more than a pixel beyond it and are not outside."""
    x1, y1, x2, y2 = corners
    low, high = min(x1, y1), max(x2 - size[0], y2 - size[1])
    if x1 >= size[0] or y1 >= size[1] or x2 <= 0 or y2 <= 0 or (low >= -1 and high <= 1):
        return corners
    return [max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])]


# VOC


def _repair_voc(dataset: AnnotatedSet, output: Path, rename: Rename, done: Changes) -> None:
    listed = dataset.annotations / f"ImageSets/Main/{dataset.split}.txt"
    annotations = dataset.annotations / "Annotations"
    try:
        names = voc_names(listed, annotations)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{listed} cannot be read ({getattr(error, 'strerror', error)}): check the path") from None
    lines, names = names, [voc_name(name, annotations) for name in names]
    spelled = [f"{line}: {name}" for line, name in zip(lines, names, strict=True) if line != name]
    done["names of the list written without folder and suffix"] += spelled
    if outside := next((name for name in names if os.path.isabs(name) or ".." in Path(name).parts), None):
        raise InputError(f"{listed} names {outside}, which is not in {annotations}: list images by their names there")
    content, faults = read_voc(dataset.annotations, dataset.split, dataset.classes, names=names)
    sizes = {row["id"]: (row["width"], row["height"]) for row in content["images"]}
    boxes = _boxes_by_image([*content["annotations"], *content["broken"]])
    twice = Counter(names)
    done["lines of the list that were there twice left out"] += (twice - Counter(twice.keys())).elements()
    files = voc_images(dataset.images)
    paths = {name: str(dataset.images / files.get(name, f"{name}.jpg")) for name in dict.fromkeys(names)}
    headers = read_headers(paths.values())
    wrong = _wrong_sizes((name, sizes[name], headers.get(paths[name]), boxes.get(name)) for name in sizes)
    for row in content["images"]:
        if row["id"] in wrong:
            row["width"], row["height"] = sizes[row["id"]] = headers[paths[row["id"]]][:2]
    _refuse_layout(annotations, check_voc(dataset.annotations, content, faults), boxes, sizes)
    kept = []
    for name, path in paths.items():
        header = headers.get(path)
        if header is None or header.problem:
            done[_GONE].append(name)
            continue
        try:
            root = fromstring((annotations / f"{name}.xml").read_bytes())
        except NO_XML:
            done["images whose annotation is missing or no XML left out"].append(name)
            continue
        if tags := spell_tags(root):
            done["files whose tags were written in small letters"].append(f"{name}: {', '.join(sorted(set(tags)))}")
        size = (header.width, header.height)
        if name in wrong:
            _write_size(root, size)
            done[_SIZES].append(name)
        _repair_xml(root, name, size, dataset.classes, rename, done)
        with atomic_path(output / f"Annotations/{name}.xml", durable=False) as temporary:
            ElementTree(root).write(temporary, encoding="utf-8")
        kept.append(name)
    _refuse_none(dataset, len(paths), done)
    write_text(output / f"ImageSets/Main/{dataset.split}.txt", "".join(f"{name}\n" for name in kept))
    (output / "JPEGImages").symlink_to(dataset.images.absolute(), target_is_directory=True)


def _write_size(root: Element, size: Size) -> None:
    for element in root.findall("size"):
        root.remove(element)
    element = SubElement(root, "size")
    for side, value in zip(("width", "height"), size, strict=True):
        SubElement(element, side).text = str(value)


def _repair_xml(
    root: Element, image: str, size: Size, classes: Sequence[str] | None, rename: Rename, done: Changes
) -> None:
    """Fix an image's annotation in place."""
    things = [(element, thing) for element in root.iter() for thing in element.findall("object")]
    for number, (above, thing) in enumerate(things):
        label = f"{image}/{number}"
        name, difficult, text = thing.find("name"), thing.find("difficult"), text_in(thing, "name")
        twice = said_twice(thing)
        if name is not None and text:
            name.text = rename(text)
            if name.text != text:
                done["objects of classes renamed"].append(f"{label}: {text}, {name.text} now")
        if difficult is not None and (value := _FLAGS.get(text_in(thing, "difficult").lower())):
            difficult.text = value
            done[f"values of difficult set to {value}"].append(label)
        known = bool(text) and (classes is None or text_in(thing, "name") in classes)
        sound = not twice and text_in(thing, "difficult", "0") in ("0", "1")
        if not (known and sound and _repair_corners(thing, label, size, done)):
            above.remove(thing)
            done["objects left out"].append(label)


def _repair_corners(thing: Element, label: str, size: Size, done: Changes) -> bool:
    """Whether the object's box, fixed in place, can be used; VOC counts pixels from 1, including the last of a box."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    boxes = thing.findall("bndbox")
    values = [number_in(thing.findtext(f"bndbox/{key}")) for key in keys]
    if len(boxes) != 1 or not all(map(is_number, values)):
        return False
    x1, y1, x2, y2 = [*map(min, values[:2], values[2:]), *map(max, values[:2], values[2:])]
    clipped = _clipped([x1 - 1, y1 - 1, x2, y2], size)
    leaves, swapped = clipped != [x1 - 1, y1 - 1, x2, y2], [x1, y1, x2, y2] != values
    if leaves and swapped:  # its numbers are wrong, not their order alone
        return False
    if swapped:
        done["corners of boxes put in order"].append(label)
    if leaves:
        done[_CLIPPED].append(label)
    x1, y1, x2, y2 = clipped[0] + 1, clipped[1] + 1, *clipped[2:]
    if [x1, y1, x2, y2] != values:
        for key, value in zip(keys, (x1, y1, x2, y2), strict=True):
            part = boxes[0].find(key)
            if part is not None:
                part.text = f"{value:g}" if value == int(value) else repr(value)
    return x2 > 0 and y2 > 0 and x1 - 1 < size[0] and y1 - 1 < size[1]
