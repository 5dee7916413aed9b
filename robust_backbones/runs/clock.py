"""The time that a run has taken, in a separate file, so that equal runs have equal checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

from robust_backbones.runs.files import refuse_damaged, write_json


def duration(seconds: float) -> str:
    """``3 h 05 min``."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


class RunClock:
    """The seconds of a run in ``folder``, including those before the checkpoint that this process resumed from."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "seconds.json"
        self._before, self._start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def save(self) -> None:
        """To be called after a checkpoint is written; a kill between loses the seconds since the previous one."""
        write_json(self._path, {"seconds": self.seconds})

    def resume(self, held: float | None = None) -> None:
        """Add the saved seconds; ``held`` are those stored in an older checkpoint."""
        if held is None:
            with refuse_damaged(self._path, "remove it; the seconds before this start are then not counted"):
                held = float(json.loads(self._path.read_text())["seconds"]) if self._path.exists() else 0.0
        self._before += held
