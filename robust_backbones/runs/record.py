"""One record per run: its settings and its results."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from robust_backbones.errors import InputError
from robust_backbones.runs.files import DAMAGED, check_types, write_json

_PACKAGES = (
    "torch",
    "torchvision",
    "detectron2",
    "sal-detectron2",
    "pycocotools",
    "faster-coco-eval",
    "fvcore",
    "numpy",
    "imagecorruptions-imaug",
    "scikit-image",
    "pyautoattack",
    "POT",
)


@dataclass(frozen=True)
class RunRecord:
    """Settings and results of one run; tables and figures are made from these alone."""

    run_id: str
    task: str
    """``pretrain``, ``finetune``, ``transfer``, ``robustness``, ``corruptions``, ``inheritance``, ``visualization``,
    ``detection``, ``segmentation`` or ``detector_robustness``."""
    backbone: dict[str, Any]
    """The BackboneSpec as a dict; for detection also the converted file's ``source_sha256``, for a training the
    ``checkpoint_sha256`` and ``best_sha256`` of its files."""
    threat_model: str | None
    """As read by ``ThreatModel.parse``; None if the source did not say."""
    dataset: str
    metrics: dict[str, float | None]
    """With Detectron2's names (``bbox/AP``), 0 to 100; distances and the measures of ``visualization`` are in their own
    units. None if undefined."""
    seed: int
    config: dict[str, Any]
    seconds: float
    git_commit: str | None = field(default_factory=lambda: git_commit())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    data_warnings: dict[str, dict[str, int]] = field(default_factory=dict)
    """For detection: data set -> kind of warning, about annotations or about what was found -> count. Empty in records
    before version 0.2."""

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def of(cls, content: Any) -> RunRecord:
        """From a file's content; the commit and package versions are those in the file, not those of this code.

        Raises:
            TypeError, ValueError: it is not a record, for example after editing by hand.
        """
        record = cls(**{"git_commit": None, "versions": {}, **content})
        check_types(record, _TYPES)
        for name, value in record.metrics.items():
            if value is not None and _PERCENTAGE.search(name) and (value < -_ROUNDING or value > 100 + _ROUNDING):
                raise ValueError(f"{name} {value} is not in 0 to 100")
        return record

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        try:
            return cls.of(json.loads(path.read_text()))
        except FileNotFoundError:
            raise InputError(f"no record at {path}: the run has not finished") from None
        except DAMAGED as error:
            raise InputError(f"{path} is not a run record ({error}): remove it, or make its run again") from None


_PERCENTAGE = re.compile("accuracy|^(?!rPC/)(.*/)?(bbox|segm)/A[PR]")
"""Metrics that are in 0 to 100; rPC is a ratio."""
_ROUNDING = 1e-6
_TYPES = get_type_hints(RunRecord)
"""The fields' types. Read once, at import: Python evaluates the annotations for it, which no record shall trigger."""


def git_commit() -> str | None:
    """The commit of this source tree, with ``+`` when it has uncommitted changes; None outside a checkout of ours."""
    own = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=own.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", own.name)  # an installed package may lie in another project's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
