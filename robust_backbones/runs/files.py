"""Files that appear whole or not at all, so that a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident


@contextmanager
def atomic_path(path: Path, *, new: bool = False, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, of its suffix, that takes its name once the block has finished without error.

    ``durable`` waits for the disk, so that the file outlives a power cut as well.

    Raises:
        FileExistsError: with ``new``, where there is such a file; of several writers one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}-{get_ident()}"
    temporary = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        (os.link if new else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, new: bool = False) -> None:
    with atomic_path(path, new=new) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
