"""Several ways to do the same work take turns, each in a process of its own, and are timed side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from robust_backbones.errors import TrainingFailedError

TOOLS = Path(__file__).resolve().parents[1]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Side:
    """What a worker holds: made once, outside the timed part.

    Attributes:
        run: the timed work.
        result: what it computed, to be held against the other ways' before any time counts.
    """

    run: Callable[[], object]
    result: Callable[[], Arrays] = dict


@dataclass(frozen=True)
class Way:
    """One way to do the work."""

    name: str
    make: str
    """``module:function`` of this package; the function takes ``options`` and returns a Side."""
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
    """The peer's distribution, when it is another's software; it then runs in the peers' environment."""


@dataclass(frozen=True)
class Times:
    """Seconds of each turn: processor seconds on CPUs, seconds between CUDA events on GPUs."""

    seconds: list[float]
    wall: list[float]
    kernels: float | None = None
    """On GPUs, the seconds of one turn's kernels, by PyTorch's profiler and after all that is timed."""

    @property
    def median(self) -> float:
        return median(self.seconds)


def take_turns(
    ways: Sequence[Way],
    check: Callable[[Mapping[str, Arrays]], None],
    *,
    rounds: int,
    warm_up: int,
    threads: int,
    device: str,
    peers_python: Callable[[], Path],
) -> dict[str, Times]:
    """Run all ways once a round, beginning with another one each round, so that a busy machine slows all of them.

    Args:
        check: raises where results differ; called with every way's result, before the first timed round.
        warm_up: rounds that do not count.
        threads: of each worker; only one of them works at a time.
        peers_python: gives the interpreter of the peers' environment, which it makes when there is none.
    """
    found: dict[str, Times] = {way.name: Times([], []) for way in ways}
    with ExitStack() as stack, tqdm(total=(warm_up + rounds) * len(ways), unit="turn", disable=None) as progress:
        workers = {
            way.name: stack.enter_context(
                Worker(way, peers_python() if way.peer else Path(sys.executable), threads=threads, device=device)
            )
            for way in ways
        }
        names = list(workers)
        for turn in range(warm_up + rounds):
            if turn == warm_up:
                check({name: worker.result() for name, worker in workers.items()})
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                progress.set_description(name[:40])
                seconds, wall = workers[name].run()
                if turn >= warm_up:
                    found[name].seconds.append(seconds)
                    found[name].wall.append(wall)
                progress.update()
        if device == "cuda":
            found = {name: replace(found[name], kernels=workers[name].kernels()) for name in names}
    return found


class Worker:
    """A process that holds one Side and works when asked."""

    def __init__(self, way: Way, python: Path, *, threads: int, device: str) -> None:
        self._name = way.name
        self._folder = tempfile.TemporaryDirectory()
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed on exit
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TOOLS.parent), str(TOOLS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(threads),
            # Idle threads that spin would be counted as work.
            "OMP_WAIT_POLICY": "passive",
        }
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self._ask(make=way.make, options=dict(way.options), threads=threads, device=device)

    def run(self) -> tuple[float, float]:
        """(Seconds as ``Times`` counts them, seconds by the clock) of one turn."""
        answer = self._ask(run=True)
        return answer["seconds"], answer["wall"]

    def kernels(self) -> float:
        return float(self._ask(kernels=True)["kernels"])

    def result(self) -> Arrays:
        path = Path(self._folder.name) / "result.npz"
        self._ask(result=str(path))
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            status = self._process.wait()
            self._said.seek(0)
            lines = self._said.read().strip().splitlines() or ["nothing was said"]
            print("\n".join(lines[-30:]), file=sys.stderr)
            raise TrainingFailedError(f"the worker of {self._name!r} ended with status {status}: {lines[-1]}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
        self._said.close()
