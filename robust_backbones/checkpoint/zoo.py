"""Published robust ImageNet backbones: the 67 of Salman et al. 2020, from the hub, and ConvNeXt, Swin, ViT and XCiT."""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from robust_backbones.checkpoint.format import sha256
from robust_backbones.checkpoint.urls import fetch_url, reason_of
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD
from robust_backbones.runs.files import write_text
from robust_backbones.threat_models import ThreatModel

REPOSITORY = "madrylab/robust-imagenet-models"
"""The repository of the files, on the Hugging Face hub."""
PREFIX = "robust://"
"""The prefix of a name in place of a path."""

# The accuracies are those that the authors publish beside the files; epsilon is in [0, 1] pixel units.
_TABLE = Path(__file__).with_name("published_backbones.csv")
# Of other authors: what they or RobustBench report, each with its source; a file keeps the name that it has there.
_ROBUST = Path(__file__).with_name("published_robust.csv")
_FED = {
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    # Images in [0, 1] as they are: no normalisation, in training or in front of the network.
    "as_is": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
}
_BY_ROBUSTBENCH = "robustbench"


@dataclass(frozen=True)
class PublishedBackbone:
    """A backbone of "Do Adversarially Robust ImageNet Models Transfer Better?" (arXiv 2007.08489), or of ``source``."""

    name: str
    """``file`` without its suffix, such as ``resnet50_l2_eps3``; its epsilon is in 1/255 if the norm is linf."""
    arch: str
    """One of ``models.ARCHITECTURES``, or timm's."""
    threat_model: ThreatModel
    """What it was trained against; epsilon 0 is standard training."""
    imagenet_accuracy: float
    """Clean top-1 accuracy on ImageNet's validation images, 0-100."""
    file: str
    """Its name in ``REPOSITORY``."""
    sha256: str = ""
    """Of the file, if the table has it; otherwise the file of the first use is the reference."""

    robust_accuracy: float | None = None
    """Accuracy under AutoAttack within ``threat_model``, 0-100, if ``source`` reports it."""
    fed: dict[str, Any] = field(default_factory=dict)
    """Mean and std, if they are not in the file."""
    evaluated: dict[str, Any] = field(default_factory=dict)
    """``val_resize`` and ``interpolation`` of a spec, if its authors' differ from the usual ones."""
    where: str = ""
    """A URL, or ``robustbench``, whose code downloads it; empty: on the hub."""
    source: str = ""
    """Source of the accuracies, and the paper."""

    @property
    def pinning(self) -> str:
        """How its file is checked: ``pinned``, with the table's sha256, or ``first use``, with the one stored then."""
        return "pinned" if self.sha256 else "first use"

    def hold(self, path: Path) -> None:
        """Check ``path`` against the table's sha256, else against the one beside it, which is stored at the first use.

        Raises:
            InputError: it is another file.
        """
        note, found = path.with_name(f"{path.name}.sha256"), sha256(path)
        if self.sha256:
            if found != self.sha256:
                raise InputError(f"{path} is not the published file, whose sha256 is {self.sha256}: delete it")
        elif not note.exists():
            write_text(note, found + "\n")
        elif note.read_text().strip() != found:
            raise InputError(f"{path} is not the file that it was (see {note.name}): delete both to download it again")


@cache
def published() -> dict[str, PublishedBackbone]:
    """All 67 published backbones by name."""
    return _read(_TABLE)


@cache
def published_robust() -> dict[str, PublishedBackbone]:
    """Published backbones of authors other than Salman et al., by RobustBench's names or their files' names."""
    return _read(_ROBUST)


def _read(table: Path) -> dict[str, PublishedBackbone]:
    """The rows of one of the two tables; only the one of other authors has all columns."""
    with open(table, newline="") as file:
        rows = [
            PublishedBackbone(
                name=row.get("name") or Path(row["file"]).stem,
                arch=row["arch"],
                threat_model=ThreatModel.parse(f"{row['norm']}:{row['eps']}"),
                imagenet_accuracy=float(row["imagenet_top1"]),
                robust_accuracy=float(row["robust"]) if "robust" in row else None,
                file=row.get("file") or f"{row['name']}.pt",
                sha256=row.get("sha256") or "",
                fed=_FED[row["fed"]] if "fed" in row else {},
                evaluated={"val_resize": int(row["val_resize"]), "interpolation": row["interpolation"]}
                if row.get("val_resize")
                else {},
                where=row.get("where", ""),
                source=row.get("source", ""),
            )
            for row in csv.DictReader(file)
        ]
    return {row.name: row for row in rows}


def find(name: str) -> PublishedBackbone:
    """The published backbone of this name.

    Raises:
        InputError: there is none; the message gives the closest names.
    """
    known = published() | published_robust()
    if name not in known:
        nearest = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0))
        raise InputError(f"no published backbone is called {name!r}: the nearest names are {nearest}")
    return known[name]


def cache_folder() -> Path:
    """The folder of downloads and converted files: ROBUST_BACKBONES_CACHE, or a folder under ~/.cache."""
    return Path(os.environ.get("ROBUST_BACKBONES_CACHE") or Path.home() / ".cache/robust_backbones")


def hub_endpoint() -> str | None:
    """The Hugging Face hub in HF_ENDPOINT; None for the usual one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def fetch(name: str) -> Path:
    """The file of a published backbone, downloaded at the first use; an interrupted download is continued.

    It is checked against its sha256 (``PublishedBackbone.hold``), and when downloading also against the hub's own.
    HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 forbids network access.

    Raises:
        InputError: no such backbone; it cannot be downloaded from the hub (the message says which file to put where);
            the file has changed.
    """
    published = find(name)
    path = cache_folder() / "published" / published.file
    if not path.exists():
        path = _fetch_elsewhere(published, path)
    published.hold(path)
    return path


def _fetch_elsewhere(published: PublishedBackbone, path: Path) -> Path:
    """The file, downloaded to ``path``, or in the cache of URLs; InputError, saying how to get it, if it is missing."""
    if not published.where:
        _download(path)
    elif published.where.endswith(".pth"):
        return fetch_url(published.where)
    elif published.where == _BY_ROBUSTBENCH:
        raise InputError(
            f"{published.name} is downloaded by robustbench alone: robustbench.utils.load_model({published.name!r}, "
            f"dataset='imagenet', threat_model='Linf') keeps it as models/imagenet/Linf/{published.file}; copy it to "
            f"{path}"
        )
    else:
        raise InputError(f"{published.name} has to be downloaded by hand: save {published.where} as {path}")
    return path


def _download(path: Path) -> None:
    """Download to ``path``, which appears once the file is complete and the one that the hub announced."""
    # Only here: it takes a second to import, and the table needs none of it.
    try:
        from filelock import FileLock
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        raise InputError("huggingface_hub is not installed: run `pip install huggingface_hub`") from None

    url = hf_hub_url(REPOSITORY, path.name, endpoint=hub_endpoint())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep downloads in {path.parent} ({error.strerror}): set ROBUST_BACKBONES_CACHE"
        ) from None
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
            raise InputError(
                f"cannot download {path.name} ({reason_of(error)}): put {url} at {path} yourself"
            ) from None
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
    return _aligned(lines)


def robust_table() -> str:
    """Name, architecture, threat model, clean and AutoAttack accuracy in %, and paper of ``published_robust``."""
    lines = [("name", "architecture", "threat model", "paper", "clean", "AutoAttack")]
    for one in published_robust().values():
        accuracies = (f"{one.imagenet_accuracy:.2f}", f"{one.robust_accuracy:.2f}")
        lines.append((one.name, one.arch, str(one.threat_model), one.source.split("; ")[-1], *accuracies))
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """In columns, the numbers of the last ones to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = len(widths) - (1 if len(widths) == 4 else 2)
    return "\n".join(
        "  ".join(f"{cell:{'<' if place < texts else '>'}{widths[place]}}" for place, cell in enumerate(line))
        for line in lines
    )
