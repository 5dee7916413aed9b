"""Reads annotations of detection data in VOC's format as COCO's content, and finds every fault in them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError, fromstring

from robust_backbones.data.annotations import LAYOUT, MISSING, Content, Fault, Use, check_coco
from robust_backbones.data.annotations_values import Row, is_number, is_side, number_in, short
from robust_backbones.data.decoding import image_suffixes, is_hidden

NO_XML = (OSError, ParseError, ValueError, RecursionError)
"""Exceptions of reading a file that is not XML, or is missing."""


def read_voc(
    folder: str | Path, split: str, classes: Iterable[str] | None = None, *, names: Iterable[str] | None = None
) -> tuple[Content, list[Fault]]:
    """A VOC set's images and objects as COCO's content, and the faults of its lists and XML files.

    Images have their names as ids, objects ``IMAGE/NUMBER``; boxes count pixels from 0, as in Detectron2. If a list has
    a second column of -1, 0 and 1, like VOC's lists for each class, images with -1 are left out. Objects with errors
    are in a separate list, ``broken``, with only their boxes.

    Args:
        folder: Holds Annotations, ImageSets/Main and JPEGImages.
        split: The list in ImageSets/Main.
        classes: The names that objects may have; None: all.
        names: Of the images, instead of those in the list.

    Raises:
        FileNotFoundError: the list is missing.
    """
    folder = Path(folder)
    listed = folder / "ImageSets/Main" / f"{split}.txt"  # an absolute path stays alone
    faults: list[Fault] = []
    try:
        lines = voc_names(listed, folder / "Annotations") if names is None else names
    except UnicodeDecodeError as error:
        lines = []
        faults.append(Fault("error", str(listed), f"is no text in UTF-8 ({error.reason})", "write it anew"))
    counts = Counter(lines)
    twice = [name for name, count in counts.items() for _ in range(count - 1)]
    faults += [Fault("error", str(listed), "is listed twice", "leave one of the lines", name) for name in twice]
    if not counts and not faults:
        faults.append(Fault("error", str(listed), "lists no image", "list one image a line"))
    files = voc_images(folder / "JPEGImages")
    content: Content = {"images": [], "annotations": [], "categories": [], "broken": []}
    numbers = {name: number for number, name in enumerate(classes or (), 1)}
    for name in counts:
        file = folder / f"Annotations/{name}.xml"
        try:
            root = fromstring(file.read_bytes())
        except FileNotFoundError:
            mend = "add it, or take the image off the list"
            if voc_name(name, folder / "Annotations") != name:
                mend = "list images without the suffix of their files, and without JPEGImages"
            faults.append(Fault("error", str(file), MISSING, mend, name))
            continue
        except NO_XML as error:
            faults.append(Fault("error", str(file), f"is no XML ({error})", "write it anew", name))
            continue
        if tags := spell_tags(root):
            what, mend = f"holds <{tags[0]}>", "write tags in small letters and without a namespace: no others are read"
            faults.append(Fault("error", str(file), what, mend, name))
        said = os.path.splitext((root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2])[0]
        if said != name.rpartition("/")[2] and said in files:
            what, mend = f"its <filename> is of another image, {said}", "see that its boxes are of this image"
            faults.append(Fault("warning", str(file), what, mend, name, kind="annotations that name another image"))
        width, height = (number_in(root.findtext(f"size/{side}"), whole=True) for side in ("width", "height"))
        image = {"id": name, "file_name": files.get(name, f"{name}.jpg"), "width": width, "height": height}
        content["images"].append(image)
        for key in ("width", "height"):
            if not is_side(image[key]):
                text = root.findtext(f"size/{key}")
                faults.append(Fault("error", str(file), f"size/{key} is {short(text)}", "write the image's", name))
        for number, thing in enumerate(root.iter("object")):
            row, problems = _voc_object(thing, numbers, open_list=classes is None)
            faults += [Fault("error", str(file), what, mend, name, number) for what, mend in problems]
            rows = content["broken" if problems else "annotations"]
            rows.append({"id": f"{name}/{number}", "image_id": name, **row})
    swapped = [fault for fault in faults if fault.mend == _ORDER]
    if len(swapped) > 0.25 * (len(swapped) + len(content["annotations"])):
        what = f"{len(swapped)} boxes have an xmax below xmin or an ymax below ymin, as of (x, y, width, height)"
        faults.append(Fault("error", str(folder / "Annotations"), what, "write corners", kind=LAYOUT))
    content["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    return content, faults


_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_TAGS = {"object": ("name", "difficult", "bndbox"), "bndbox": _CORNERS, "size": ("width", "height")}
"""Element -> its child elements that are read."""
_ORDER = "xmax and ymax have to be the larger ones"


def voc_names(listed: Path, annotations: Path) -> list[str]:
    """The images in a list, whose names may have spaces and folders.

    Raises:
        OSError, UnicodeDecodeError: the list cannot be read.
    """
    names = []
    for line in filter(None, map(str.strip, listed.read_text("utf-8-sig").splitlines())):
        if "\\" in line and not os.path.exists(annotations / f"{line}.xml"):
            line = line.replace("\\", "/")  # as Windows has it
        columns = re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)
        if not columns or os.path.exists(annotations / f"{line}.xml"):  # unlike Path's, never raises
            names.append(line)
        elif columns[2] != "-1":
            names.append(columns[1])
    return names


def voc_name(listed: str, annotations: Path) -> str:
    """The name of an image's annotation, if the image is listed as a file or by its path."""
    stem = os.path.splitext(listed)[0]
    for name in (listed, stem, stem.rpartition("JPEGImages/")[2], os.path.basename(stem)):
        if os.path.exists(annotations / f"{name}.xml"):
            return name
    return listed


def voc_images(folder: Path) -> dict[str, str]:
    """File names by image name, including folders; of several the JPEG, else an image of another format."""
    files = [
        os.path.relpath(os.path.join(place, file), folder) for place, _, names in os.walk(folder) for file in names
    ]
    suffixes = image_suffixes()

    def rank(file: str) -> tuple[bool, bool, str]:
        suffix = os.path.splitext(file)[1].lower()
        return suffix in (".jpg", ".jpeg"), suffix in suffixes, file

    return {os.path.splitext(file)[0]: file for file in sorted(files, key=rank)}


def voc_classes(folder: str | Path) -> list[str]:
    """The names of the objects in all XML files of a VOC folder, sorted; other files are left out."""
    names: set[str] = set()
    annotations = Path(folder) / "Annotations"
    for file in annotations.rglob("*.xml"):
        if is_hidden(str(file.relative_to(annotations))):
            continue
        with suppress(*NO_XML):
            names |= {text_in(thing, "name") for thing in fromstring(file.read_bytes()).iter("object")}
    return sorted(names - {""})


def spell_tags(root: Element) -> list[str]:
    """Rename tags that differ only in case and namespace from those that are read; returns the former names."""
    found = []
    for above in root.iter():
        known = ("object", "size") if above is root else ("object", *_TAGS.get(_plain_tag(above), ()))
        for element in above:
            if element.tag != (plain := _plain_tag(element)) and plain in known:
                found.append(element.tag)
                element.tag = plain
    return found


def _plain_tag(element: Element) -> str:
    return str(element.tag).rpartition("}")[2].lower()


def text_in(thing: Element, key: str, default: str = "") -> str:
    """The text of an object's element, without surrounding blanks and line breaks."""
    return thing.findtext(key, default).strip()


def said_twice(thing: Element) -> list[str]:
    """Which of an object's name and ``difficult`` have several values."""
    keys = ("name", "difficult")
    return [key for key in keys if len({(element.text or "").strip() for element in thing.findall(key)}) > 1]


def _voc_object(thing: Any, numbers: dict[str, int], *, open_list: bool) -> tuple[Row, list[tuple[str, str]]]:
    problems = []
    name = text_in(thing, "name")
    if open_list and name:
        numbers.setdefault(name, len(numbers) + 1)
    if name not in numbers:
        known = ", ".join(numbers) or "none"
        problems.append((f"name is {short(name)}", f"it has to be one of the classes, {known}"))
    difficult = text_in(thing, "difficult", "0")
    if difficult not in ("0", "1"):
        problems.append((f"difficult is {short(difficult)}", "it has to be 0 or 1"))
    problems += [(f"it has several of <{key}>", "leave one: programs read the first") for key in said_twice(thing)]
    texts = {side: thing.findtext(f"bndbox/{side}") for side in _CORNERS}
    x1, y1, x2, y2 = (number_in(text) for text in texts.values())
    if len(thing.findall("bndbox")) != 1 or any(not is_number(value) for value in (x1, y1, x2, y2)):
        problems.append((f"bndbox is {short(list(texts.values()))}", "it has to hold xmin, ymin, xmax and ymax"))
    elif x2 < x1 or y2 < y1:
        problems.append((f"bndbox is {short(list(texts.values()))}", _ORDER))
    box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
    if problems:
        return {"bbox": box}, problems
    row = {"category_id": numbers[name], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    told = {text_in(attribute, "name"): attribute.findtext("value") for attribute in thing.iter("attribute")}
    angle = {"attributes": {"rotation": number_in(told["rotation"])}} if "rotation" in told else {}  # as CVAT writes it
    return row | {"difficult": int(difficult)} | angle, []


def check_voc(folder: str | Path, content: Content, faults: Iterable[Fault], use: Use | None = None) -> list[Fault]:
    """``faults`` of ``read_voc``, and those of its ``content`` by the checks of COCO's format, errors first."""
    found = [*faults]
    rows = content["annotations"]
    if rows and (use or Use()).evaluation and all(row["difficult"] for row in rows):
        what = f"all its {len(rows)} objects are difficult, which AP leaves out"
        found.append(Fault("error", str(folder), what, "set some to 0, or evaluate on another set"))
    named = {fault.image for fault in found if fault.severity == "error"}
    for fault in check_coco(Path(folder) / "Annotations", content, use):
        if fault.image not in named or fault.image is None:
            mend = re.sub(
                "write bbox as .* corner", "write xmin, ymin, xmax and ymax in pixels of the image", fault.mend
            )
            found.append(replace(fault, mend=mend))
    for row in rows:
        if min(row["bbox"][:2]) < 0:
            what = "its xmin or ymin is below 1, the first pixel of VOC"
            mend = (
                "if the set counts from 0, all its boxes begin a pixel too far left and up: add 1 to every xmin and "
                "ymin, and to xmax and ymax where these are a box's last pixel"
            )
            file, ids = str(Path(folder) / "Annotations"), (row["image_id"], row["id"])
            found.append(Fault("warning", file, what, mend, *ids, kind="boxes that may count pixels from 0"))
    return sorted(found, key=lambda fault: fault.severity)
