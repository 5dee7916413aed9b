"""Ownership of a run's folder: by one run and, while a command writes to it, by one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.distributed import ALONE, Processes
from robust_backbones.runs.files import remove_leftovers, write_json
from robust_backbones.runs.identity import Settings, check_same, differences, read_settings
from robust_backbones.runs.locks import guard, lock, remove_if_dead

LOCK = "lock.json"


@contextmanager
def own_folder(folder: str | Path) -> Iterator[None]:
    """Be the only process that writes ``folder`` while the block runs; partial files of dead ones are removed.

    Raises:
        HeldError: another process is; the message names it.
        TrainingFailedError: the folder was removed meanwhile.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with lock(folder / LOCK) as dead:
            if dead:
                print(f"taking over {folder} from {dead}, which ended without giving its lock back", flush=True)
            remove_leftovers(folder.rglob("*.tmp*"))
            try:
                yield
            finally:
                if not (folder / LOCK).exists():
                    raise TrainingFailedError(
                        f"{folder} was removed while the run wrote it, and what it held is lost: start the run again"
                    )
    finally:
        with suppress(OSError):  # of what was refused nothing stays
            for path in made:
                path.rmdir()


def tell_finished(folder: Path) -> None:
    """Say that the results that follow are of an earlier run: data may have changed since."""
    print(f"finished before: {folder}; its results are read, and nothing runs again", flush=True)


def began(folder: Path) -> bool:
    """Whether a run has written more than settings and logs into its folder; if not, it may start with others."""
    return any(_is_result(folder, path) for path in (folder.rglob("*") if folder.exists() else ()))


def _is_result(folder: Path, path: Path) -> bool:
    first = path.relative_to(folder).parts[0]
    return not (
        first in ("images", "tensorboard")  # which images are evaluated, and curves
        or path.name in ("config.json", "config.yaml", LOCK)
        or path.name.startswith((".", "log.txt", "events.out."))
        or path.suffix in (".log", ".out", ".err")  # of shells and schedulers
        or path.is_dir()
    )


@contextmanager
def claimed(
    folder: Path, config: Settings, defaults: Settings | None = None, *, processes: Processes = ALONE
) -> Iterator[bool]:
    """Claim ``folder``, and be the only process that writes it in the block; yields whether its run has finished.

    A finished run is only read, which is said. With several ``processes`` of one run, the main one claims for all. A
    run that ended before it had begun, for example because its settings were refused, leaves its folder free.

    Raises:
        InputError: the folder holds another run or something else; or, a HeldError, another process writes it.
    """
    with ExitStack() as stack:
        finished = False
        if processes.is_main:
            path = folder / "config.json"
            finished = (folder / "record.json").exists() and path.exists()
            if finished or began(folder):
                claim(folder, config, defaults)  # refuses what is not this run before anything is written
            if finished:
                remove_if_dead(folder / LOCK)
            else:
                stack.enter_context(own_folder(folder))
                finished = _take(folder, config, defaults)
            if finished:
                tell_finished(folder)
        yield processes.broadcast(finished)


@contextmanager
def shared(folder: Path, config: Settings, defaults: Settings | None = None) -> Iterator[None]:
    """Claim ``folder`` with any number of processes of the same run, which share its work while the block runs.

    A run that ended before it had begun leaves its folder free for another, once all of its processes have ended.
    Partial files of dead processes are removed.

    Raises:
        InputError: the folder holds another run or something else.
    """
    if began(folder):
        claim(folder, config, defaults)  # refuses what is not this run before anything is written
    own = folder / f".{socket.gethostname()}~{os.getpid()}.{LOCK}"
    with lock(own):
        with guard(folder / ".config.guard"):
            others = [path for path in folder.glob(f".*.{LOCK}") if path != own]
            for path in others:
                remove_if_dead(path)
            (claim if any(path.exists() for path in others) else _take)(folder, config, defaults)
        remove_leftovers(folder.rglob("*.tmp*"))
        yield


def _take(folder: Path, config: Settings, defaults: Settings | None) -> bool:
    """``claim`` by the only process that writes ``folder``: a run that had not begun loses it."""
    path = folder / "config.json"
    if path.exists() and not began(folder) and differences(read_settings(path), config, defaults):
        write_json(path, config)
    return claim(folder, config, defaults)


def claim(folder: Path, config: Settings, defaults: Settings | None = None) -> bool:
    """Make ``folder`` belong to the run with these settings, by its config.json; True if that run has finished there.

    Any number of processes may claim a folder at once; of different runs, one gets it.

    Args:
        defaults: values of the settings that an older config.json may lack.

    Raises:
        InputError: the folder holds something else.
    """
    path = folder / "config.json"
    empty = not folder.exists() or all(path.name.startswith(".") or path.name == LOCK for path in folder.iterdir())
    if not path.exists():  # looked for after the rest: what another process has written since comes after its config
        if not empty:
            raise InputError(f"{folder} is not empty and holds no run of ours: choose another output folder")
        with suppress(FileExistsError):
            write_json(path, config, new=True)
            return False
    check_same(folder, read_settings(path), config, defaults)
    return (folder / "record.json").exists()
