"""Cells: evaluations with a record each, run once, by whichever of several processes comes first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from robust_backbones.errors import PreemptedError, plural
from robust_backbones.runs.locks import lock_if_free, remove_if_dead
from robust_backbones.runs.signals import StopRequest

C = TypeVar("C")


def run_cells(
    cells: Sequence[C],
    folder: Callable[[C], Path],
    run: Callable[[C], str],
    stop: StopRequest,
    *,
    ready: Callable[[C], bool] = lambda cell: True,
) -> None:
    """Run every cell that has no record yet; return when all have one.

    Cells that another process holds, or that are not ``ready`` yet, are tried again later.

    Args:
        folder: where a cell's ``record.json`` is, and its lock.
        run: writes that record and returns a sentence about it to print.

    Raises:
        PreemptedError: ``stop`` was requested; finished cells are kept.
    """

    def missing() -> list[C]:
        return [cell for cell in cells if not is_finished(folder(cell))]

    if 0 < (found := len(cells) - len(missing())) < len(cells):
        print(f"finished before: {found} of {len(cells)} cells", flush=True)
    started, ran = time.perf_counter(), 0
    while pending := missing():
        before = ran
        for cell in pending:
            check_stop(stop)
            if not ready(cell):
                continue
            with lock_if_free(folder(cell) / "lock.json") as free:
                if free and not is_finished(folder(cell)):
                    sentence = run(cell)
                    ran += 1
                    left = len(missing())
                    minutes = (time.perf_counter() - started) / ran * left / 60
                    pace = f", about {minutes:.0f} min to go" * bool(left)
                    print(f"{sentence}; {len(cells) - left} of {plural(len(cells), 'cell')}{pace}", flush=True)
        if ran == before:
            time.sleep(1)
    for cell in cells:
        remove_if_dead(folder(cell) / "lock.json")
    check_stop(stop)


def check_stop(stop: StopRequest) -> None:
    """Raise PreemptedError if ``stop`` was requested."""
    if stop:
        raise PreemptedError("asked to stop: finished cells are kept; give the same command again to resume")


def is_finished(folder: Path) -> bool:
    """Whether a cell has its record."""
    return (folder / "record.json").exists()
