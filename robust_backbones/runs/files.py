"""Atomic writes: files appear whole or not at all, so that a kill at any moment loses nothing."""

from __future__ import annotations

import glob
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from types import UnionType
from typing import Any, get_args, get_origin

from robust_backbones.errors import InputError

DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""Exceptions of reading JSON that is damaged, or of something else."""


@contextmanager
def atomic_path(path: Path, *, new: bool = False, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix, renamed to ``path`` once the block has finished without error.

    Leftovers of a killed process for the same file are removed, including temporary files of temporary files.
    ``durable`` flushes to the disk, so that the file and its name survive a power cut too.

    Raises:
        FileExistsError: with ``new``, if the file exists; of several writers one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}~{os.getpid()}~{get_ident()}.tmp{path.suffix}")
    if durable:
        remove_leftovers(path.parent.glob(f".*{glob.escape(path.stem)}.*~*~*.tmp*"))
    try:
        yield temporary
        if durable:
            _sync(temporary)
        (os.link if new else os.replace)(temporary, path)
        if durable:
            _sync(path.parent)
    except (OSError, RuntimeError) as error:
        # torch raises an error of its own after that of the disk, which names no file.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.strerror and str(cause.filename or temporary) == str(temporary):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):  # a disk that is read-only, or gone
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove those of ``paths`` that ``atomic_path`` left behind when processes of this machine died while writing."""
    for path in paths:
        name, *writer = path.name.rsplit("~", 2)
        if len(writer) == 2 and name.endswith(f".{socket.gethostname()}") and not _lives(int(writer[0])):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """Write a text atomically, in UTF-8; ``new`` as in ``atomic_path``."""
    with atomic_path(path, new=new) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")  # a path of bytes that are no text


def write_json(path: Path, value: object, *, new: bool = False) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n", new=new)


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def refuse_damaged(path: Path, mend: str) -> Iterator[None]:
    """Reading the JSON of ``path`` in the block; ``InputError`` with the ``mend`` where it is damaged."""
    try:
        yield
    except DAMAGED as error:
        raise InputError(f"{path} is damaged ({error!r}): {mend}") from None


def check_types(made: object, types: Mapping[str, Any]) -> None:
    """Raise ValueError with the names of the fields of ``made``, read from JSON, that have other types."""
    if wrong := [name for name, kind in types.items() if not _is_of(kind, getattr(made, name))]:
        raise ValueError(", ".join(wrong))


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a JSON value has the type of a field's annotation."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(part, value) for part in parts)
    if get_origin(kind) is tuple:  # tuple[..., ...]
        return isinstance(value, tuple) and all(_is_of(parts[0], item) for item in value)
    if parts:  # dict[str, ...]
        return isinstance(value, dict) and all(_is_of(parts[1], item) for item in value.values())
    if isinstance(value, int | float) and kind in (int, float):  # larger ones are no float, or no seed
        return isinstance(value, kind | int) and not abs(value) >= 2**64
    return kind is Any or isinstance(value, kind)
