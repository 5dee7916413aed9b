"""Images that a run leaves out because they cannot be read: found once, and from then on part of its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from robust_backbones.data.annotations_images import undecodable
from robust_backbones.data.annotations_sets import AnnotatedSet

_LEFT_OUT = "left_out"
_logger = logging.getLogger(__name__)


def unreadable_rows(name: str, dataset: AnnotatedSet) -> list[tuple[str, int | str, str]]:
    """Rows for DATASETS.SKIPPED, (name, image id, file): the images of a set that do not decode whole.

    Raises:
        FileNotFoundError: of an annotation file or list.
    """
    _, content = dataset.check()
    files = {str(dataset.images / row["file_name"]): row for row in content.get("images", []) if "file_name" in row}
    return [(name, files[path]["id"], files[path]["file_name"]) for path in sorted(undecodable(files))]


def leave_out(cfg: CfgNode) -> None:
    """Register the sets of DATASETS.SKIPPED again without the images that it lists."""
    rows: dict[str, dict[int | str, str]] = {}
    for name, image, file in cfg.DATASETS.SKIPPED:
        rows.setdefault(name, {})[image] = file
    for name, files in rows.items():
        if name not in DatasetCatalog or left_out(name) == files:
            continue
        _logger.warning(f"{len(files)} images of {name} cannot be read and are left out: {', '.join(files.values())}")
        metadata, load = MetadataCatalog.get(name).as_dict(), DatasetCatalog[name]
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load_rest, load, files))
        MetadataCatalog.get(name).set(**{**metadata, "name": name, _LEFT_OUT: files})


def left_out(name: str) -> dict[int | str, str]:
    """The images that a registered set leaves out: id -> file."""
    found: dict[int | str, str] = MetadataCatalog.get(name).get(_LEFT_OUT, {})
    return found


def _load_rest(load: Callable[[], list[dict[str, Any]]], files: dict[int | str, str]) -> list[dict[str, Any]]:
    return [item for item in load() if item["image_id"] not in files]
