"""Every cell is run once, whoever runs it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.runs.cells import run_cells
from robust_backbones.runs.locks import HeldError, Owner, lock
from robust_backbones.runs.signals import StopRequest


def test_cells_run_once_in_their_order_those_that_are_not_ready_later(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(cell: str) -> str:
        ran.append(cell)
        (tmp_path / cell / "record.json").touch()
        return cell

    def ready(cell: str) -> bool:
        return cell != "a" or "c" in ran

    for _ in range(2):
        run_cells("abc", lambda cell: tmp_path / cell, run, StopRequest(), ready=ready)
        dead = replace(Owner.here(), born="5")  # killed between its record and the removal of its lock
        (tmp_path / "b/lock.json").write_text(json.dumps(asdict(dead)))
    assert ran == ["b", "c", "a"]
    run_cells("abc", lambda cell: tmp_path / cell, run, StopRequest())
    assert not (tmp_path / "b/lock.json").exists()


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    """Tried again until it is finished: here, once the machine asks to stop."""
    stop, seen = StopRequest(), list[str]()

    def ready(cell: str) -> bool:
        seen.append(cell)
        if len(seen) > 1:
            stop.signal = 15
        return True

    with lock(tmp_path / "a/lock.json"), pytest.raises(PreemptedError):
        run_cells("a", lambda cell: tmp_path / cell, lambda cell: pytest.fail("it is held"), stop, ready=ready)


def test_a_cells_own_error_is_not_taken_for_a_lock_of_another_process(tmp_path: Path) -> None:
    def run(cell: str) -> str:
        with lock(tmp_path / "data/lock.json"):
            return cell

    with lock(tmp_path / "data/lock.json"), pytest.raises(HeldError, match="data is in use"):
        run_cells("a", lambda cell: tmp_path / cell, run, StopRequest())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/lock.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="no lock of ours"):
        run_cells("b", lambda cell: tmp_path / cell, run, StopRequest())


def test_a_signal_in_the_last_cell_is_answered_too(tmp_path: Path) -> None:
    stop = StopRequest()

    def run(cell: str) -> str:
        stop.signal = 15
        (tmp_path / cell / "record.json").touch()
        return cell

    with pytest.raises(PreemptedError, match="finished cells are kept"):
        run_cells("a", lambda cell: tmp_path / cell, run, stop)
    assert (tmp_path / "a/record.json").exists()
    run_cells("a", lambda cell: tmp_path / cell, run, StopRequest())
