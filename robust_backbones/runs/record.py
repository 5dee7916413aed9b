"""One record a run: what it was and what came out of it."""

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
    """What one run was and what came out of it; tables and figures are drawn from these alone."""

    run_id: str
    task: str
    """``pretrain``, ``finetune``, ``transfer``, ``robustness``, ``corruptions``, ``inheritance``, ``visualization``,
    ``detection``, ``segmentation`` or ``detector_robustness``."""
    backbone: dict[str, Any]
    """The BackboneSpec as a dict; for detection also the converted file's ``source_sha256``, for a training
    the ``checkpoint_sha256`` and ``best_sha256`` of what it wrote."""
    threat_model: str | None
    """As ``ThreatModel.parse`` reads it; None when the source did not say."""
    dataset: str
    metrics: dict[str, float | None]
    """Named as Detectron2 names them (``bbox/AP``), 0 to 100; distances and what ``visualization`` measures are in
    their own units. None where not defined."""
    seed: int
    config: dict[str, Any]
    seconds: float
    git_commit: str | None = field(default_factory=lambda: git_commit())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    data_warnings: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of detection: data set -> what is odd in its annotations -> how often. Empty in records before version 0.2."""

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def of(cls, content: Any) -> RunRecord:
        """From a file's content; where that does not say so, this code's commit and these packages did not make it.

        Raises:
            TypeError, ValueError: it is no record, as files that were edited by hand.
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
"""The fields' types. Looked at once: to find them Python runs the annotations, which nobody's record is to set off."""


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
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
