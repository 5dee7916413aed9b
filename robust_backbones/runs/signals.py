"""Signals that ask a run to stop: they set a flag in the main process and are ignored in its data workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType

from robust_backbones.errors import PreemptedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Sent by schedulers before they take a machine away."""


class StopRequest:
    """Whether the machine has asked this process to stop."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle signals by ``handler`` while the block runs; in a thread, which may not set any, as before."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in (signals if is_main else ())}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def stop_on_signals(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[StopRequest]:
    """Turn these signals into a flag to check, while the block runs.

    Raises:
        PreemptedError: a signal was received while data workers were starting, and they died of it.
    """
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = number

    try:
        with handled(remember, signals):
            yield request
    except RuntimeError as error:
        if request and str(error).startswith("DataLoader worker"):
            raise PreemptedError("asked to stop: give the same command again to resume") from None
        raise


@contextmanager
def end_on_signals() -> Iterator[None]:
    """End the block at STOP_SIGNALS, wherever it is: for code that does not check a ``StopRequest``, such as a start.

    Processes that the block forks die of them, as usual.

    Raises:
        PreemptedError: a signal was received.
    """
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in STOP_SIGNALS:  # the first one is answered, and what it leads to is not disturbed
            signal.signal(other, signal.SIG_IGN)
        raise _Asked

    try:
        with handled(end, STOP_SIGNALS):
            yield
    except _Asked:
        raise PreemptedError("asked to stop: give the same command again") from None


class _Asked(BaseException):
    """Not an ``Exception``, so that error handlers do not catch it."""


@cache
def stop_for_parent_only() -> None:
    """To be called in each data worker: stop only when the process that started it asks.

    Schedulers signal every process of a run. The main one handles the signal, and needs its workers until its state is
    saved; when it ends, Python stops them by SIGTERM.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is no worker"
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_wait_for, args=(parent.pid,), daemon=True).start()


def _wait_for(parent: int | None) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)  # PyTorch calls another status an error of the worker
