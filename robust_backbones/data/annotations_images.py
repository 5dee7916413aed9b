"""Images of detection data: headers are read in parallel, cached, and compared with the annotations."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from PIL import Image
from tqdm import tqdm

from robust_backbones.data.annotations import MISSING, Fault
from robust_backbones.data.decoding import ImageInputError, check_claim
from robust_backbones.runs.files import atomic_path

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_ORIENTATION = 0x0112
Listings = dict[str, defaultdict[str, list[str]]]
"""Folder -> plain stem -> files: what was read of folders."""
UNREADABLE = "images that cannot be read"
"""The kind of fault of an image whose pixels cannot be read."""
_UPLOADED = r"^(?!(?:19|20)\d{6})[0-9a-f]{8}-"
"""What Label Studio puts before the names of files; a date is the file's own."""
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Header(NamedTuple):
    """The header of an image file."""

    width: int
    """As shown, after the orientation tag of EXIF."""
    height: int
    orientation: int
    """EXIF's: above 1 the image is shown mirrored or rotated, from 5 on with its sides exchanged."""
    problem: str
    """Why its pixels cannot be read; "" if they can."""


def read_header(path: str | Path) -> Header:
    """Read the header of an image file; files that end too early are decoded fully."""
    try:
        with Image.open(path) as image:
            check_claim(image, os.path.getsize(path))
            width, height = image.size
            tag = image.getexif().get(_ORIENTATION, 1)
            orientation = tag if tag in range(1, 9) else 1
            problem = _problem(image)
            if not problem and not _is_whole(path, _ENDS.get(image.format or "")):
                image.load()
            return Header(*((height, width) if orientation > 4 else (width, height)), orientation, problem)
    except Exception as error:  # on damaged bytes Pillow raises nearly every type there is
        return Header(0, 0, 1, f"cannot be read ({ImageInputError.of('', error).reason})")


def _problem(image: Image.Image) -> str:
    """Why Detectron2 reads wrong pixels from an opened image; "" if it does not."""
    if image.mode in _DEEP:
        return f"has pixels of more than 8 bits (Pillow's mode {image.mode}), whose white nothing names"
    if image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) != 1:
        return "is a TIFF file with an orientation tag, by which Detectron2 turns it twice"
    return ""


def _is_whole(path: str | Path, end: bytes | None) -> bool:
    if end is None:
        return False
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - 32, 0))
        return end in file.read()


def undecodable(paths: Iterable[str]) -> list[str]:
    """Existing image files whose pixels cannot be read; each is decoded fully."""

    def is_sound(path: str) -> bool:
        with suppress(Exception), Image.open(path) as image:
            problem = _problem(image)
            image.load()
            return not problem
        return not os.path.exists(path)

    paths = list(paths)
    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(is_sound, paths, chunksize=64), "decoding images", len(paths), unit="img", disable=None)
        return [path for path, sound in zip(paths, found, strict=True) if not sound]


def check_image(path: str | Path) -> None:
    """Refuse an image file that Pillow cannot read completely and correctly.

    Raises:
        ImageInputError: naming the file.
    """
    if problem := read_header(path).problem:
        raise ImageInputError(f"the image {path} {problem}: convert or replace it", problem)


def read_headers(paths: Iterable[str], *, workers: int = 8, cache: Path | None = None) -> dict[str, Header]:
    """The headers of existing image files; ``cache`` keeps them by file, size and modification time."""
    paths, stamps = set(paths), dict[str, list[int]]()
    for folder in {os.path.dirname(path) for path in paths}:
        if os.path.isdir(folder or "."):
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    if (path := os.path.join(folder, entry.name)) in paths:
                        with suppress(OSError):  # a link to nowhere is no image
                            status = entry.stat()
                            stamps[path] = [status.st_size, status.st_mtime_ns]
    folders = sorted({os.path.abspath(os.path.dirname(path)) for path in stamps})
    digest = hashlib.sha256("\n".join([*Header._fields, *folders]).encode())
    store = cache / f"headers-{digest.hexdigest()[:16]}.json" if cache else None
    known = _stored(store)
    keys = {path: os.path.abspath(path) for path in stamps}
    headers = {
        path: Header(*known[keys[path]][1])
        for path, stamp in stamps.items()
        if keys[path] in known and known[keys[path]][0] == stamp
    }
    unread = sorted(stamps.keys() - headers.keys())
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(read_header, unread, chunksize=64), "images", len(unread), unit="img", disable=None)
        headers |= dict(zip(unread, found, strict=True))
    if store and unread:
        with suppress(OSError), atomic_path(store) as temporary:  # a cache that cannot be written costs time alone
            # Several sets may share a folder of images.
            known |= {keys[path]: [stamps[path], header] for path, header in headers.items()}
            temporary.write_text(json.dumps(known))
    return headers


def _stored(store: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(store.read_bytes()) if store else {}
        return {path: row for path, row in content.items() if len(row) == 2 and len(row[1]) == len(Header._fields)}
    except (OSError, ValueError, TypeError, AttributeError):  # not there yet, or damaged
        return {}


def check_images(
    images: Iterable[tuple[int | str, str, int, int]], *, workers: int = 8, cache: Path | None = None
) -> list[Fault]:
    """Faults of image files.

    Args:
        images: (image id, path, width, height), with the sizes in the annotations.
    """
    faults, listings = [], Listings()
    images = list(images)
    headers = read_headers([path for _, path, *_ in images], workers=workers, cache=cache)
    for image, path, width, height in images:
        if (header := headers.get(path)) is None:
            faults.append(Fault("error", path, MISSING, _mend_of_missing(path, listings), image))
        elif header.problem:
            mend = "convert or replace it, or remove it from the set"
            faults.append(Fault("error", path, header.problem, mend, image, kind=UNREADABLE))
        elif (header.width, header.height) != (width, height):
            what = f"is {header.width} x {header.height}, and {width} x {height} in the annotations"
            if header.orientation > 4:
                what += "; its EXIF tag turns it"
            faults.append(Fault("error", path, what, "correct width and height, and look at the boxes", image))
        elif header.orientation > 1 and (header.orientation < 5 or width == height):
            what = "its EXIF tag mirrors or turns it, which its size does not tell"
            mend = "see that its boxes are of the image as it is shown"
            faults.append(Fault("warning", path, what, mend, image, kind="images that a tag mirrors or turns"))
    return faults


def spell_names(images: list[dict[str, Any]], folder: Path) -> list[str]:
    """Give rows of images whose file is not there the name of the one that it differs from by case, accents, ``\\`` or
    %20 alone, by folders that are not there, or by what Label Studio puts before it; the new names. Of several nothing
    says which one."""
    listings, found = Listings(), []
    missing = [row for row in images if "file_name" in row and not os.path.exists(folder / str(row["file_name"]))]
    for row in missing:
        name = str(row["file_name"]).replace("\\", "/")
        alike = _files_alike(str(folder / name), listings)
        suffix = os.path.splitext(name)[1].casefold()
        if len(same := [file for file in alike if file.casefold().endswith(suffix)]) == 1:
            row["file_name"] = os.path.join(os.path.dirname(name), *same)
            found.append(row["file_name"])
    used = Counter(_last_part(row, folder) for row in (images if missing else []))
    for row in missing:
        name = _last_part(row, folder)
        if name and used[name] == 1 and not os.path.exists(folder / str(row["file_name"])):
            row["file_name"] = name
            found.append(name)
    return found


def _last_part(row: dict[str, Any], folder: Path) -> str:
    """The name of the file in the folder, by the last part of the row's alone, and as it was before its upload."""
    name = os.path.basename(str(row.get("file_name")).replace("\\", "/"))
    return next((one for one in (name, re.sub(_UPLOADED, "", name)) if os.path.isfile(folder / one)), "")


def _files_alike(path: str, listings: Listings) -> list[str]:
    """The files in its folder whose names are a path's but for what ``_plain_stem`` leaves out; of its suffix first."""
    folder, name = os.path.split(path)
    if folder not in listings:
        listings[folder] = defaultdict(list)
        for file in os.listdir(folder) if os.path.isdir(folder) else []:
            listings[folder][_plain_stem(file)].append(file)
    suffix = os.path.splitext(name)[1].casefold()
    return sorted(listings[folder].get(_plain_stem(name), []), key=lambda file: not file.casefold().endswith(suffix))


def _mend_of_missing(path: str, listings: Listings) -> str:
    """How to fix the name of a missing file."""
    folder, name = os.path.split(path.replace("\\", "/"))
    plain, above = re.sub(_UPLOADED, "", name), (Path(folder), *Path(folder).parents)
    if plain != name and (found := next((place for place in above if os.path.isfile(place / plain)), None)):
        return f"{found} has {plain!r}, without what Label Studio puts before it: write file_name so"
    if "\\" in path:
        return "write / between folders in file_name, not \\"
    folder, name = os.path.split(path)
    if others := _files_alike(path, listings):
        return f"its folder has {others[0]!r}: write file_name as the file is called"
    places = (*Path(folder).parents, *_inside(folder, listings))
    if found := next((place for place in places if os.path.exists(place / name)), None):
        return f"it is in {found}: give another image folder, or mend file_name"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}: check the image folder and file_name"
    return "add the image, or remove it from the set"


def _inside(folder: str, listings: Listings) -> list[Path]:
    """The first subfolder of a folder."""
    key = os.path.join(folder, "*")
    if key not in listings:
        folders = [entry.path for entry in os.scandir(folder) if entry.is_dir()] if os.path.isdir(folder) else []
        listings[key] = defaultdict(list, {"": sorted(folders)[:20]})
    return [Path(path) for path in listings[key][""]]


def _plain_stem(name: str) -> str:
    """A file's name without the parts that file systems and programs often change: case, accents, suffix, %20."""
    return unicodedata.normalize("NFC", unquote(os.path.splitext(name)[0])).casefold()
