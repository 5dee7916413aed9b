"""The checkpoints from which a training run resumes, in a folder that keeps the newest ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_backbones.checkpoint.format import TRAINING_FORMAT, save_tensors
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.distributed import Processes


@dataclass(frozen=True)
class CheckpointFolder:
    """Files ``step_NNNNNNNNN.pt``, of which the newest ``keep`` are kept; each is written atomically."""

    folder: Path
    keep: int

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step_*.pt"))

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.pt"

    def write(self, step: int, content: dict[str, Any]) -> None:
        """Write a checkpoint, then remove the oldest ones."""
        path = self.path(step)
        with self.guard(path):
            save_tensors(path, {"format": TRAINING_FORMAT, **content})
        for old in self.paths()[: -self.keep]:
            old.unlink()

    def newest(self, processes: Processes) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest one that the main process can read, its content, and why each later one cannot; None of none.

        All processes take that one: another may see the folder later.

        Raises:
            InputError: none can be read, or that one by another process.
        """
        found = self._newest() if processes.is_main else None
        path = processes.broadcast(found and found[0])
        return found if found or not path else (path, load_tensors(path), [])

    def _newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        problems: list[str] = []
        for path in reversed(self.paths()):
            try:
                return path, load_tensors(path), problems
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(f"no checkpoint in {self.folder} can be read: choose another --output")
        return None

    def last_good(self) -> str:
        """The newest path for messages, or ``none``."""
        return str(paths[-1]) if (paths := self.paths()) else "none"

    @contextmanager
    def guard(self, path: Path) -> Iterator[None]:
        """Turn a failed write of ``path`` into a ``TrainingFailedError`` that names the checkpoint to resume from."""
        try:
            yield
        except OSError as error:
            raise TrainingFailedError(
                f"cannot write {path} ({error.strerror or error}): make room and give the same command again; "
                f"the last good checkpoint is {self.last_good()}"
            ) from error
