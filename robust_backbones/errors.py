"""Exceptions with messages for the user, and checks of config values that raise them."""

import errno
import math
from collections.abc import Collection
from typing import Any


class InputError(Exception):
    """The user's input is wrong; the message is one sentence that says what is wrong and how to fix it.

    Command lines print it without a traceback and exit with ``exit_status`` (see ``cli.run``).
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises as type(error)("Caught ... Original Traceback ... InputError: message");
        # keep the sentence alone, in one line whatever the error that it quotes.
        lines = map(str.strip, message.rsplit("InputError: ", 1)[-1].splitlines())
        super().__init__(" ".join(filter(None, lines)))


class MissingPackageError(InputError, ModuleNotFoundError):
    """An optional package is not installed; ``except ImportError`` and ``pytest.importorskip`` catch it too."""


class TrainingFailedError(InputError):
    """A run started well and failed."""

    exit_status = 1


class ProofFailedError(InputError):
    """A converted network differs from its source; nothing of it is kept."""

    exit_status = 1


class DivergedError(TrainingFailedError):
    """The loss is not finite, or far too large."""


class PreemptedError(InputError):
    """A run was asked to stop, wrote its state and stopped; the same command resumes it (sysexits' EX_TEMPFAIL)."""

    exit_status = 75


_ROOM = "make room and give the same command again"
_ELSEWHERE = "choose another place for the output"
_MENDS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and give the same command again",
    errno.EIO: "the disk fails: copy what is there, and choose another one",
    errno.ESTALE: "the network's file system was lost: give the same command again",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG), _ELSEWHERE),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _ELSEWHERE),  # a file where a folder is to be
    **dict.fromkeys((errno.ENOENT, errno.EISDIR, errno.ELOOP), "check the path"),
}
_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


def disk_error(error: OSError) -> InputError | None:
    """The error of a full, read-only or missing disk as one sentence; None for other errors."""
    if error.errno not in _MENDS or not error.strerror:
        return None
    what = TrainingFailedError if error.errno in _FAILED else InputError
    return what(f"{error.filename or 'a file'}: {error.strerror[0].lower()}{error.strerror[1:]}: {_MENDS[error.errno]}")


def plural(count: int, noun: str) -> str:
    """``1 image``, ``1,000 images``, ``2 classes``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending * (count != 1)}"


def check_positive(config: object, *names: str) -> None:
    """Raise ``InputError`` unless these attributes of ``config`` are finite and > 0, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be > 0, got {value}")


def check_not_negative(config: object, *names: str) -> None:
    """Raise ``InputError`` unless these attributes of ``config`` are finite and >= 0."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"{name} must be >= 0, got {getattr(config, name)}")


def check_seeds(config: object) -> None:
    """Raise ``InputError`` for a seed among ``seed``, ``seeds`` and ``data_seed`` that generators do not accept."""
    for name in ("seed", "seeds", "data_seed"):
        found = getattr(config, name, ())
        for seed in found if isinstance(found, tuple | list) else (found,):
            if abs(seed) >= 2**43:  # they take 64 bits, and some get a million times the seed
                raise InputError(f"{name} {seed} is too large for random numbers: give one below 2^43")


def check_crop(config: Any) -> None:
    """Raise ``InputError`` unless the central crop lies in the resized image."""
    if 0 < config.val_resize < config.image_size:
        small = f"val_resize {config.val_resize} is smaller than the crop, image_size {config.image_size}"
        raise InputError(f"{small}: give --val-resize {config.image_size} or more")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ``InputError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
