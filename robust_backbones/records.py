"""Results on disk: one record a run, written so that a kill at any moment loses nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any

from robust_backbones.errors import InputError

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
    """``pretrain``, ``robustness``, ``detection``, ``segmentation``, ``detector_robustness``, ``transfer``,
    ``inheritance``, ``corruptions`` or ``visualization``."""
    backbone: dict[str, Any]
    """The BackboneSpec as a dict; for detection also the converted file's ``source_sha256``."""
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

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise InputError(f"no record at {path}: the run has not finished") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a run record ({error})") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the block has finished without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{get_ident()}.tmp{path.suffix}")  # writers go by it
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def claim(output: Path, identity: dict[str, Any]) -> bool:
    """Make ``output`` the folder of the run that ``identity`` tells; True when that run has already finished there.

    Raises:
        InputError: the folder holds something else.
    """
    path = output / "config.json"
    if path.exists():
        held = json.loads(path.read_text())
        if different := sorted(key for key in identity.keys() | held.keys() if identity.get(key) != held.get(key)):
            raise InputError(
                f"{output} holds another run (it differs in {', '.join(different)}): choose another --output"
            )
        return (output / "record.json").exists()
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no run of ours: choose another --output")
    write_json(path, identity)
    return False


def write_json(path: Path, value: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def git_commit() -> str | None:
    """The commit of this source tree, with ``+`` when it has uncommitted changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
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
