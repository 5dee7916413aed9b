"""``MODEL.WEIGHTS robust://NAME``: a published backbone, downloaded, converted and proven at the first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.convert import convert_file, read_backbone
from robust_backbones.checkpoint.format import sha256
from robust_backbones.checkpoint.sources import read_published
from robust_backbones.checkpoint.zoo import PREFIX
from robust_backbones.detection.verify import prove
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path


def converted_backbone(name: str) -> Path:
    """The published backbone ``name`` in Detectron2's format, in the cache.

    Raises:
        InputError: there is none of this name, it cannot be downloaded, or Detectron2's ResNet cannot be it.
        ProofFailedError: its features differ from the source's.
    """
    source = zoo.fetch(name)
    path = zoo.cache_folder() / "detectron2" / f"{name}.pkl"
    note = path.with_name(f"{path.name}.sha256")
    if _is_made_of(path, note, sha256(source)):
        return path
    convert_file(read_published(name), path, prove=prove).check()
    with atomic_path(note) as temporary:
        temporary.write_text(sha256(path) + "\n")
    return path


def _is_made_of(path: Path, note: Path, source_sha256: str) -> bool:
    """Whether ``path`` is as it was written, from that source, by this version of the format."""
    try:
        return note.read_text().strip() == sha256(path) and read_backbone(path)[1].source_sha256 == source_sha256
    except (OSError, InputError):
        return False


class RobustPathHandler(PathHandler):
    """Makes ``robust://NAME`` a path for all of Detectron2."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(converted_backbone(path.removeprefix(PREFIX)))


PathManager.register_handler(RobustPathHandler(), allow_override=True)
