"""The published robust ImageNet backbones of Salman et al. 2020: what each one is, and what its file is called."""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel

REPOSITORY = "madrylab/robust-imagenet-models"
"""Where the files are, on the Hugging Face hub."""

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


@cache
def published() -> dict[str, PublishedBackbone]:
    """All 67 published backbones by name."""
    with open(_TABLE, newline="") as file:
        return {Path(row["file"]).stem: _read(row) for row in csv.DictReader(file)}


def _read(row: dict[str, str]) -> PublishedBackbone:
    return PublishedBackbone(
        name=Path(row["file"]).stem,
        arch=row["arch"],
        threat_model=ThreatModel.parse(f"{row['norm']}:{row['eps']}"),
        imagenet_accuracy=float(row["imagenet_top1"]),
        file=row["file"],
    )


def find(name: str) -> PublishedBackbone:
    """The published backbone of this name.

    Raises:
        InputError: there is none; the message gives the names that come nearest.
    """
    if name not in published():
        nearest = ", ".join(difflib.get_close_matches(name, published(), n=4, cutoff=0))
        raise InputError(f"no published backbone is called {name!r}: the nearest names are {nearest}")
    return published()[name]


def table() -> str:
    """Name, architecture, threat model and ImageNet accuracy (clean top-1, in %) of every one, in aligned columns."""
    lines = [("name", "architecture", "threat model", "ImageNet accuracy")]
    for backbone in published().values():
        accuracy = f"{backbone.imagenet_accuracy:.2f}"
        lines.append((backbone.name, backbone.arch, str(backbone.threat_model), accuracy))
    first, second, third, last = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:{first}}  {arch:{second}}  {threat_model:{third}}  {accuracy:>{last}}"
        for name, arch, threat_model, accuracy in lines
    )
