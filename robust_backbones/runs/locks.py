"""Lock files with one owner at a time: a lock names its owner, and a dead owner loses it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from robust_backbones.errors import InputError
from robust_backbones.runs.files import DAMAGED, check_types, write_json

STALE_SECONDS = 600.0
"""Silence after which an owner on another machine, whose process cannot be checked, counts as dead."""
_HEARTBEAT_SECONDS = 15.0


@dataclass(frozen=True)
class Owner:
    """A process, and the time since which it has owned a lock."""

    host: str
    pid: int
    born: str | None
    """Start time of the process according to the kernel: its id may have been reused since."""
    since: str
    """Local time."""

    @classmethod
    def here(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


_TYPES = get_type_hints(Owner)


class HeldError(InputError):
    """Another process owns the lock."""


@contextmanager
def lock(path: Path) -> Iterator[Owner | None]:
    """Own ``path`` while the block runs; yields the dead owner that it was taken from, if any.

    The file's modification time is the owner's last sign of life. An owner that finds its lock taken by another (its
    machine slept for long and was believed dead) gets SIGTERM.

    Raises:
        HeldError: its owner is alive.
    """
    own = Owner.here()
    dead = _acquire(path, own)
    end = threading.Event()
    heart = threading.Thread(target=_show_life, args=(path, own, end), daemon=True)
    heart.start()
    try:
        yield dead
    finally:
        end.set()
        heart.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """``lock``, but yields False if another process owns ``path``; a HeldError raised in the block is passed on."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(path))
            free = True
        except HeldError:
            free = False
        yield free


def owner_of(path: Path) -> Owner | None:
    """The living owner of a lock."""
    owner = _read(path)
    return owner if owner and _is_alive(owner, path) else None


def remove_if_dead(path: Path) -> None:
    """Remove a lock whose owner died right after its last write, if nobody will take it over."""
    if path.exists() and not owner_of(path):
        path.unlink(missing_ok=True)


def _acquire(path: Path, own: Owner) -> Owner | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with guard(path.with_name(f".{path.name}.guard")):  # of two that find a dead owner's file, one removes it
        held = _read(path)
        if held is None or not _is_alive(held, path):
            path.unlink(missing_ok=True)
            try:
                write_json(path, asdict(own), new=True)  # one succeeds also where a file system has no flock
                return held
            except FileExistsError:
                held = _read(path) or own
        far = "" if held.host == own.host else f"; if it is dead, {STALE_SECONDS / 60:.0f} minutes of silence free it"
        raise HeldError(
            f"{path.parent} is in use by {held}, whose last sign of life is {_silence(path):.0f} s old: wait for it, "
            f"or end it{far}"
        )


@contextmanager
def guard(path: Path) -> Iterator[None]:
    """Keep other processes of this machine out of the block while it runs."""
    while True:
        with open(path, "a") as guard:
            with suppress(OSError):  # a file system may have no such locks
                fcntl.flock(guard, fcntl.LOCK_EX)
            if not _is_open(guard.fileno(), path):
                continue  # whoever had it has removed it since
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> Owner | None:
    try:
        owner = Owner(**json.loads(path.read_text()))
        check_types(owner, _TYPES)
        return owner
    except FileNotFoundError:
        return None
    except DAMAGED:
        raise InputError(f"{path} is no lock of ours: remove it when nothing is at work there") from None


def _is_alive(owner: Owner, path: Path) -> bool:
    if owner.host == socket.gethostname() and owner.born:
        return _start_time(owner.pid) == owner.born
    return _silence(path) < STALE_SECONDS


def _silence(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _start_time(pid: int) -> str | None:
    """None for a dead process, including a zombie, and where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _show_life(path: Path, own: Owner, end: threading.Event) -> None:
    while not end.wait(_HEARTBEAT_SECONDS):
        with suppress(OSError):  # a network's file system may be away for a while
            if _read(path) != own:
                os.kill(own.pid, signal.SIGTERM)
                return
            os.utime(path)
