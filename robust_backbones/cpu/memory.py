"""What this process does with memory that it has freed."""

from __future__ import annotations

import contextlib
import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Have this process use its freed memory again rather than give it back; on Linux with glibc, else nothing.

    glibc gives blocks over 32 MB back to the kernel at once, which clears them, page by page, when they are asked for
    again. The benchmark ``training-step`` has a row without it. The price: a process stays as large as it ever was.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
