"""Images that a run leaves out: unreadable ones, found once and then stored in its configuration, and held-out training
images, for selection."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from robust_backbones.data.annotations_images import undecodable
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.detection.standard_format import Items, register
from robust_backbones.errors import InputError, plural

SHOWN_CLASSES = "ap_over_shown_classes"
"""Metadata of a set in VOC's format: whether its AP leaves out classes without objects, as COCO's does."""
_LEFT_OUT = "left_out"
_WHOLE = "whole"
_Files = dict[int | str, str]
_logger = logging.getLogger(__name__)


def unreadable_rows(name: str, dataset: AnnotatedSet) -> list[tuple[str, int | str, str]]:
    """Rows for DATASETS.SKIPPED, (name, image id, file): the images of a set that cannot be fully decoded.

    Raises:
        FileNotFoundError: an annotation file or list is missing.
    """
    rows = dataset.image_files(dataset.read()[0])
    lost = set(undecodable({path for path, _ in rows}))
    found = sorted((pair for pair in rows if pair[0] in lost), key=lambda pair: pair[0])
    return [(name, row["id"], row["file_name"]) for _, row in found]


def leave_out(cfg: CfgNode) -> None:
    """Register the sets of DATASETS.SKIPPED again without the images that it lists."""
    rows: dict[str, _Files] = {}
    for name, image, file in cfg.DATASETS.SKIPPED:
        rows.setdefault(name, {})[image] = file
    for name, files in rows.items():
        if name not in DatasetCatalog or files.items() <= left_out(name).items():
            continue
        _logger.warning(f"left out, unreadable: {plural(len(files), 'image')} of {name}: {', '.join(files.values())}")
        _register_rest(name, name, partial(dict, {**left_out(name), **files}))


def hold_out(cfg: CfgNode) -> None:
    """Register the sets of DATASETS.TRAIN again without the DATASETS.HELD_OUT images that NAME_held_out gets.

    Those are the ones whose file names have the lowest SHA-256, for any order of annotations. Nothing is read yet.
    """
    for name in cfg.DATASETS.TRAIN:
        if whole := MetadataCatalog.get(name).get(_WHOLE, None) if name in DatasetCatalog else None:
            register(name, *whole)
        if cfg.DATASETS.HELD_OUT and name in DatasetCatalog:
            whole = DatasetCatalog[name], MetadataCatalog.get(name).as_dict()
            parts = cache(partial(_parts, whole[0], name, cfg.DATASETS.HELD_OUT))
            _register_rest(name, f"{name}_held_out", partial(_part, parts, 0), **{SHOWN_CLASSES: True})
            _register_rest(name, name, partial(_part, parts, 1))
            MetadataCatalog.get(name).set(**{_WHOLE: whole})


def left_out(name: str) -> _Files:
    """The images that a registered set leaves out: id -> file."""
    return MetadataCatalog.get(name).get(_LEFT_OUT, dict)()


def _parts(load: Callable[[], Items], name: str, count: int) -> tuple[_Files, _Files]:
    """The images that are not held out, and those that are."""
    files = {item["image_id"]: Path(item["file_name"]).name for item in load()}
    if count >= len(files):
        raise InputError(
            f"DATASETS.HELD_OUT {count} leaves none of {name}, which has {plural(len(files), 'image')}: give less"
        )
    order = sorted(files, key=lambda image: hashlib.sha256(files[image].encode()).digest())
    held = set(order[:count])
    return (
        {image: file for image, file in files.items() if image not in held},
        {image: file for image, file in files.items() if image in held},
    )


def _part(parts: Callable[[], tuple[_Files, _Files]], place: int) -> _Files:
    return parts()[place]


def _register_rest(source: str, name: str, files: Callable[[], _Files], **metadata: Any) -> None:
    """``source`` without some images, as ``name``."""
    known, load = MetadataCatalog.get(source).as_dict(), DatasetCatalog[source]
    register(name, partial(_load_rest, load, files, source, name), {**known, **metadata, _LEFT_OUT: files})


def _load_rest(load: Callable[[], Items], files: Callable[[], _Files], source: str, name: str) -> Items:
    items, without = load(), files()
    known = MetadataCatalog.get(name).as_dict()  # what loading a set says of its classes
    MetadataCatalog.get(name).set(**{k: v for k, v in MetadataCatalog.get(source).as_dict().items() if k not in known})
    return [item for item in items if item["image_id"] not in without]
