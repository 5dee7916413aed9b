"""What a benchmark is: a kind of work, the ways to do it, what must be equal, what was to be reached; its record."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch

from benchmarks.peers import peers_python
from benchmarks.turns import Arrays, Times, Way, take_turns
from robust_backbones.classification.compute import computes_bfloat16
from robust_backbones.errors import ProofFailedError
from robust_backbones.runs.files import write_json
from robust_backbones.runs.record import git_commit, versions


@dataclass(frozen=True)
class Check:
    """An equality that has to hold before any time counts: ``found <= limit``."""

    what: str
    found: float
    limit: float


@dataclass(frozen=True)
class Reach:
    """What was to be reached: the cost of ``than`` is ``at_least`` times that of ``way``."""

    way: str
    than: str
    at_least: float = 0.0
    at_most: float = 0.0
    """In place of ``at_least``."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Options of every benchmark; ``measure`` leaves its record in OUTPUT."""

    name: ClassVar[str]
    title: ClassVar[str]
    warm_up: ClassVar[int] = 1
    """Rounds that do not count, on CPUs."""
    on_gpu: ClassVar[bool] = False
    """Whether a GPU has a part in it."""

    output: Path = Path("runs/benchmarks")
    """Folder for the record, and for networks and peers that are made on the way."""
    rounds: int = 3
    """Turns of each way that count; the table gives their median."""
    threads: int = 1
    """Of each way's process, on CPUs."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    peers: bool = True
    """Whether to measure other software too; it is installed in an environment of its own."""

    def ways(self) -> list[Way]:
        """None where ``measure`` is another one, without turns."""
        return []

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        """Hold the ways' results against each other."""
        return []

    def reaches(self) -> list[Reach]:
        return []

    @property
    def record(self) -> Path:
        return self.output / f"{self.name}{'-cuda' if self.device == 'cuda' else ''}.json"

    @property
    def units(self) -> tuple[int, str]:
        """How many of what one turn does."""
        return 1, "run"

    @property
    def remark(self) -> str:
        """What the reader has to know of how it was measured, in Markdown."""
        return ""

    def measure(self) -> dict[str, Any]:
        """Let all ways take turns and write the record.

        Raises:
            ProofFailedError: the ways' results are not equal; no time is told then.
        """
        begin = time.perf_counter()
        # In software, bfloat16 takes hours here and says nothing about where it is used.
        bf16 = self.device == "cuda" or computes_bfloat16()
        ways = [way for way in self.ways() if (self.peers or not way.peer) and (bf16 or "bf16" not in way.name)]
        checks: list[Check] = []

        def check(results: Mapping[str, Arrays]) -> None:
            checks.extend(self.check(results))
            require(checks)

        times = take_turns(
            ways,
            check,
            rounds=self.rounds,
            warm_up=3 if self.device == "cuda" else self.warm_up,  # in the first, graphs are recorded
            threads=self.threads,
            device=self.device,
            peers_python=lambda: peers_python(self.output / "peers"),
        )
        count, unit = self.units
        rows = [
            {"way": way.name, "peer": way.peer} | {k: v for k, v in vars(times[way.name]).items() if v is not None}
            for way in ways
        ]
        return self.write(
            {
                "rows": rows,
                "count": count,
                "unit": unit,
                "checks": [vars(check) for check in checks],
                "reaches": [_reached(reach, times) for reach in self.reaches()],
                "minutes": (time.perf_counter() - begin) / 60,
            }
        )

    def write(self, content: Mapping[str, Any]) -> dict[str, Any]:
        shown = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("output", "peers") and not isinstance(getattr(self, field.name), Path | None)
        }
        record = {
            "name": self.name,
            "title": self.title,
            "remark": self.remark,
            "options": shown,
            **content,
            "machine": machine(self.device),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json(self.record, record)
        return record


def require(checks: Sequence[Check]) -> None:
    """Raise ProofFailedError for the first check that does not hold; NaN does not."""
    for check in checks:
        if not check.found <= check.limit:
            raise ProofFailedError(
                f"{check.what}: {check.found:.2g}, and {check.limit:g} is allowed; nothing is timed before that holds"
            )


def ratios(times: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, greatest) of to / times, turn by turn: what slows the machine slows both."""
    values = [b / a for a, b in zip(times, to, strict=True)]
    return median(values), min(values), max(values)


def _reached(reach: Reach, times: Mapping[str, Times]) -> dict[str, Any]:
    if not {reach.way, reach.than} <= times.keys():
        return {**vars(reach), "found": None}
    if reach.at_most:
        found = ratios(times[reach.than].seconds, times[reach.way].seconds)
    else:
        found = ratios(times[reach.way].seconds, times[reach.than].seconds)
    return {**vars(reach), "found": found}


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge times by: the processor and how fast it is at bfloat16; None: in software."""
    if device == "cuda":
        return {"processor": torch.cuda.get_device_name(), "bf16_over_fp32": _matmul(device)}
    names = {
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name") and ":" in line
    }
    flags = {flag for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags") for flag in line.split()}
    return {
        "processor": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "instructions": ", ".join(
            [
                torch.backends.cpu.get_cpu_capability(),
                *(["AVX512-BF16"] if "avx512_bf16" in flags else []),
                "AMX" if "amx_bf16" in flags else "no AMX",
            ]
        ),
        "bf16_over_fp32": _matmul(device) if computes_bfloat16() else None,
    }


def _matmul(device: str) -> float:
    """How many times as fast as in float32 a matrix product is in bfloat16."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    factors = {dtype: torch.ones(2048, 2048, dtype=dtype, device=device) for dtype in seconds}
    for _ in range(5):
        for dtype, taken in seconds.items():
            start = time.perf_counter()
            (factors[dtype] @ factors[dtype])[0, 0].item()
            taken.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
