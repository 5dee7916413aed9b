"""Groups of options shared by several commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from robust_backbones.errors import check_not_negative

Device = Literal["cpu", "cuda"]
DEVICE: Device = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class DeviceOptions:
    device: Device = DEVICE
    workers: int = 2
    """Processes that read and change images; results do not depend on it."""

    def __post_init__(self) -> None:
        check_not_negative(self, "workers")


@dataclass(kw_only=True)
class EvaluationOptions(DeviceOptions):
    """Options of every evaluation of a classifier."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of any source that `robust-backbones convert` knows, or hub:NAME."""
    data: Path
    """Folder that holds one folder of images a class."""
    output: Path
    """Folder for the results."""
