"""The published robust ImageNet backbones of Salman et al. 2020: what each one is, and its file from the hub."""

from __future__ import annotations

import csv
import difflib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from robust_backbones.checkpoint.format import sha256
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path
from robust_backbones.threat_models import ThreatModel

REPOSITORY = "madrylab/robust-imagenet-models"
"""Where the files are, on the Hugging Face hub."""
PREFIX = "robust://"
"""What stands before a name where a path is expected."""

# The accuracies are those that the authors publish beside the files; epsilon is in [0, 1] pixel units.
_TABLE = Path(__file__).with_name("published_backbones.csv")


@dataclass(frozen=True)
class PublishedBackbone:
    """One backbone of "Do Adversarially Robust ImageNet Models Transfer Better?" (arXiv 2007.08489)."""

    name: str
    """``file`` without its suffix, as in ``resnet50_l2_eps3``; epsilon is in 1/255 there where the norm is linf."""
    arch: str
    """One of ``models.ARCHITECTURES``."""
    threat_model: ThreatModel
    """What it was trained against; epsilon 0 is standard training."""
    imagenet_accuracy: float
    """Clean top-1 accuracy on ImageNet's validation images, 0-100."""
    file: str
    """Its name in ``REPOSITORY``."""
    sha256: str = ""
    """Of the file, where the table has it; otherwise the file that is used first is the one that holds."""

    @property
    def pinning(self) -> str:
        """What its file is held to: ``pinned``, to the table's sha256, or ``first use``, to the one noted then."""
        return "pinned" if self.sha256 else "first use"

    def hold(self, path: Path) -> None:
        """Hold ``path`` to the table's sha256, else to the one beside it, which is noted at the first use.

        Raises:
            InputError: it is another file.
        """
        note, found = path.with_name(f"{path.name}.sha256"), sha256(path)
        if self.sha256:
            if found != self.sha256:
                raise InputError(f"{path} is not the published file, whose sha256 is {self.sha256}: delete it")
        elif not note.exists():
            with atomic_path(note) as temporary:
                temporary.write_text(found + "\n")
        elif note.read_text().strip() != found:
            raise InputError(f"{path} is not the file that it was (see {note.name}): delete both to download it again")


@cache
def published() -> dict[str, PublishedBackbone]:
    """All 67 published backbones by name."""
    with open(_TABLE, newline="") as file:
        rows = [
            PublishedBackbone(
                name=Path(row["file"]).stem,
                arch=row["arch"],
                threat_model=ThreatModel.parse(f"{row['norm']}:{row['eps']}"),
                imagenet_accuracy=float(row["imagenet_top1"]),
                file=row["file"],
                sha256=row.get("sha256") or "",
            )
            for row in csv.DictReader(file)
        ]
    return {row.name: row for row in rows}


def find(name: str) -> PublishedBackbone:
    """The published backbone of this name.

    Raises:
        InputError: there is none; the message gives the names that come nearest.
    """
    if name not in published():
        nearest = ", ".join(difflib.get_close_matches(name, published(), n=4, cutoff=0))
        raise InputError(f"no published backbone is called {name!r}: the nearest names are {nearest}")
    return published()[name]


def cache_folder() -> Path:
    """Where downloads and what is made of them are kept: ROBUST_BACKBONES_CACHE, or a folder under ~/.cache."""
    return Path(os.environ.get("ROBUST_BACKBONES_CACHE") or Path.home() / ".cache/robust_backbones")


def fetch(name: str) -> Path:
    """The file of a published backbone, downloaded at the first use; a download that was cut off is continued.

    It is held to its sha256 (``PublishedBackbone.hold``); while downloading, to the hub's own too.
    HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 forbids the network.

    Raises:
        InputError: no such backbone; it cannot be had from the hub (the message says which file to put where); it is
            not the file that it was.
    """
    published = find(name)
    path = cache_folder() / "published" / published.file
    if not path.exists():
        _download(path)
    published.hold(path)
    return path


def _download(path: Path) -> None:
    """Download to ``path``, which appears once the file is whole and the one that the hub promised."""
    # Only here: it takes a second to import, and the table needs none of it.
    try:
        from filelock import FileLock
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        raise InputError("huggingface_hub is not installed: run `pip install huggingface_hub`") from None

    url = hf_hub_url(REPOSITORY, path.name, endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep downloads in {path.parent} ({error}): set ROBUST_BACKBONES_CACHE") from None
    # hf_hub_download would start again after a process was killed.
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():  # another process had the lock
            return
        try:
            promised = get_hf_file_metadata(url)
            if not (promised.commit_hash and promised.size):
                raise ValueError("what answered is no hub")  # such as a network's log-in page
            etag = re.sub(r"\W", "", promised.etag or "")
            part = path.with_name(f".{path.name}.{etag[:16]}.part")
            if part.exists() and part.stat().st_size > promised.size:
                part.unlink()
            with open(part, "ab") as file:
                headers, size = build_hf_headers(token=False), promised.size
                http_get(promised.location, file, resume_size=file.tell(), headers=headers, expected_size=size)
        except Exception as error:  # a network can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot download {path.name} ({reason}): put {url} at {path} yourself") from None
        if re.fullmatch("[0-9a-f]{64}", etag) and sha256(part) != etag:
            part.unlink()
            raise InputError(f"the hub sent a damaged {path.name}, and it was deleted: run the same command again")
        os.replace(part, path)


def table() -> str:
    """Name, architecture, threat model and ImageNet accuracy (clean top-1, in %) of every one, in aligned columns."""
    lines = [("name", "architecture", "threat model", "ImageNet accuracy")]
    lines += [
        (one.name, one.arch, str(one.threat_model), f"{one.imagenet_accuracy:.2f}") for one in published().values()
    ]
    first, second, third, last = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(f"{a:{first}}  {b:{second}}  {c:{third}}  {d:>{last}}" for a, b, c, d in lines)
