"""Detectron2's metrics.json, but a kill neither loses nor duplicates rows that the last checkpoint covers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from robust_backbones.runs.files import refuse_damaged, write_text


class MetricsFile(EventWriter):
    """Like Detectron2's JSONWriter, but with one line per iteration: later values of the same iteration, such as its
    evaluation, are added to its line. A kill can truncate only the last line.

    A resumed run keeps the lines before ``start_iter``; what was logged after its checkpoint is logged again.
    Losses are medians over 20 iterations.
    """

    def __init__(self, path: Path, start_iter: int) -> None:
        self._path = path
        self._written: dict[str, int] = {}
        self._lines: dict[int, str] = {}
        self._end = -1
        """The iteration of the file's last line; -1: the file is to be rewritten."""
        with refuse_damaged(path, "remove its damaged lines"):
            for line in path.read_text().splitlines() if start_iter and path.exists() else ():
                if line.endswith("}") and (iteration := json.loads(line)["iteration"]) < start_iter:
                    self._lines[iteration] = line

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(20)
        new = {name: pair for name, pair in latest.items() if pair[1] > self._written.get(name, -1)}
        if not new:
            return
        for name, (value, iteration) in new.items():
            row = json.loads(self._lines.get(iteration, "{}")) | {"iteration": iteration, name: value}
            self._lines[iteration] = json.dumps(row, sort_keys=True)
            self._written[name] = iteration
        changed = sorted({iteration for _, iteration in new.values()})
        if 0 <= self._end < changed[0]:  # a long run's file has megabytes, and this is called every few seconds
            with open(self._path, "a") as file:
                file.write(self._text(changed))
                file.flush()
                os.fsync(file.fileno())
        else:
            write_text(self._path, self._text(sorted(self._lines)))
        self._end = max(self._lines)

    def _text(self, iterations: list[int]) -> str:
        return "".join(f"{self._lines[iteration]}\n" for iteration in iterations)
