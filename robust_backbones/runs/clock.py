"""How long a run has taken, in a file of its own: equal runs have equal checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

from robust_backbones.runs.files import write_json


class RunClock:
    """The seconds of a run in ``folder``, with those before the checkpoint that this process resumed from."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "seconds.json"
        self._before, self._start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def save(self) -> None:
        """To be called once a checkpoint is written; a kill between the two loses the seconds since the one before."""
        write_json(self._path, {"seconds": self.seconds})

    def resume(self, held: float | None = None) -> None:
        """Add the seconds that were saved; ``held`` are those in an older checkpoint."""
        if held is None:
            held = json.loads(self._path.read_text())["seconds"] if self._path.exists() else 0.0
        self._before += held
