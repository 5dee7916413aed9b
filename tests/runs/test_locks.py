"""A lock has one living owner."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from robust_backbones.errors import InputError
from robust_backbones.runs.locks import HeldError, Owner, _show_life, lock, owner_of
from tests.conftest import ROOT
from tests.sweep.conftest import wait_until


def test_a_lock_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with lock(path) as dead:
        assert dead is None
        owner = owner_of(path)
        assert owner is not None
        assert owner.pid == os.getpid()
        with pytest.raises(HeldError, match=rf"process {os.getpid()} on {socket.gethostname()} since \d+"), lock(path):
            raise AssertionError
        assert path.exists()
    assert not path.exists()
    assert owner_of(path) is None


def other_owner(path: Path, **fields: Any) -> Owner:
    owner = Owner(**{"host": "elsewhere", "pid": 1, "born": "1", "since": "2026-01-01 00:00:00", **fields})
    path.write_text(json.dumps(owner.__dict__))
    return owner


def test_a_dead_process_gives_its_lock_up(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # dead, and not buried
    own = Owner.here()
    for fields in ({"pid": ended.pid, "born": "5"}, {"pid": os.getpid(), "born": "5"}):  # the latter: a pid used again
        dead = other_owner(tmp_path / "lock.json", host=own.host, **fields)
        assert owner_of(tmp_path / "lock.json") is None
        with lock(tmp_path / "lock.json") as found:
            assert found == dead
    ended.wait()


def test_another_machine_is_dead_after_a_long_silence(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    owner = other_owner(path)
    os.utime(path, (time.time() - 300,) * 2)
    assert owner_of(path) == owner
    with pytest.raises(HeldError, match="elsewhere since 2026-01-01 00:00:00, whose last sign of life is 300 s old"):
        lock(path).__enter__()
    os.utime(path, (time.time() - 700,) * 2)
    with lock(path) as dead:
        assert dead == owner


def test_owners_show_that_they_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_backbones.runs.locks._HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "lock.json"
    with lock(path):
        os.utime(path, (0, 0))
        wait_until(lambda: time.time() - path.stat().st_mtime < 5)


def test_an_owner_outlives_a_disk_that_is_away_for_a_while(tmp_path: Path) -> None:
    """As a network's file system: the next sign of life comes when it is back."""
    path, away = tmp_path / "run/lock.json", tmp_path / "away"
    path.parent.mkdir()

    class Beats(threading.Event):
        count = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.count += 1
            if self.count == 1:
                path.parent.rename(away)
                path.parent.touch()
            elif self.count == 2:
                path.parent.unlink()
                away.rename(path.parent)
            return self.count == 3

    own = other_owner(path)
    os.utime(path, (0, 0))
    _show_life(path, own, Beats())
    assert path.stat().st_mtime > 0


def test_who_was_believed_dead_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_backbones.runs.locks._HEARTBEAT_SECONDS", 0.05)
    asked: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number) if pid == os.getpid() else None)
    path = tmp_path / "lock.json"
    with lock(path):
        owner = other_owner(path)
        wait_until(lambda: signal.SIGTERM in asked)
    assert owner_of(path) == owner  # and leaves the other's lock alone


def test_of_many_that_want_a_dead_owners_lock_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from robust_backbones.runs.locks import HeldError, lock\n"
        "path, gun, end = map(Path, sys.argv[1:])\n"
        "print('ready', flush=True)\n"
        "while not gun.exists(): time.sleep(0.001)\n"
        "try:\n    with lock(path):\n        print('mine')\n        while not end.exists(): time.sleep(0.01)\n"
        "except HeldError: print('held')\n"
    )
    path, gun, end = tmp_path / "lock.json", tmp_path / "gun", tmp_path / "end"
    other_owner(path, host=socket.gethostname(), born="5", pid=os.getpid())
    command = [sys.executable, "-c", code, str(path), str(gun), str(end)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(8)]
    assert [process.stdout and process.stdout.readline() for process in many] == ["ready\n"] * 8
    gun.touch()
    wait_until(lambda: sum(process.poll() is not None for process in many) == 7)
    end.touch()
    said = sorted(process.communicate(timeout=600)[0].strip() for process in many)
    assert said == ["held"] * 7 + ["mine"]


def test_a_strange_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{}")
    with pytest.raises(InputError, match="no lock of ours"), lock(tmp_path / "lock.json"):
        raise AssertionError
