"""The runs of a study, their folders, and their progress as read from these; needs no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.runs.files import DAMAGED, check_types, refuse_damaged, write_json
from robust_backbones.runs.locks import owner_of

STATES = ("waiting", "ready", "running", "preempted", "failed", "done")
"""waiting: for another run; preempted: started, then interrupted in any way; the next launch resumes it."""
_OURS = ("cluster", "jobs", "lock.json", "primary.json", "report", "runs")
"""What a study's folder contains besides its plan."""
ATTEMPT = "----"
"""Start of the first line of each attempt in a run's log."""


@dataclass(frozen=True)
class Run:
    """One call of one verb."""

    key: str
    """A readable name, and a hash of the configuration and the weights: another setting gives another run."""
    kind: str
    """``pretrain``, ``convert``, ``detect``, ``transfer`` or ``evaluate``."""
    group: str
    """Runs of one group take about the same time."""
    argv: tuple[str, ...]
    """A module, as after ``python -m``, and its arguments: robust_backbones, a verb and its options."""
    needs: tuple[str, ...] = ()
    """Keys of the runs that must be done first."""
    results: tuple[str, ...] = ("record.json",)
    """Files of its folder, written atomically; the run is done once all exist."""
    work: int = 1
    """Iterations of a detector, epochs of a pre-training."""
    task: str = ""
    """Of the manifest; empty for runs that its tasks share."""

    def command(self, processes: int, machines: Machines | None = None) -> list[str]:
        """``argv`` for this many processes, one per GPU, on each of the machines."""
        if self.kind == "detect":
            module, verb, *options = self.argv
            where = machines.of_detectron2() if machines else ()
            return [module, verb, "--num-gpus", str(processes), *where, *options]
        if self.kind == "pretrain" and (processes > 1 or machines):
            where = machines.of_torchrun() if machines else ("--standalone",)
            return ["torch.distributed.run", *where, f"--nproc-per-node={processes}", "-m", *self.argv]
        return [*self.argv]

    @property
    def is_distributed(self) -> bool:
        """Whether its processes can be on several machines."""
        return self.kind not in ("convert", "evaluate", "transfer")


@dataclass(frozen=True)
class Machines:
    """The machines of one run, and which of them this is."""

    count: int
    rank: int
    address: str
    """HOST:PORT of the first one."""

    def of_detectron2(self) -> tuple[str, ...]:
        numbers = ("--num-machines", str(self.count), "--machine-rank", str(self.rank))
        return (*numbers, "--dist-url", f"tcp://{self.address}")

    def of_torchrun(self) -> tuple[str, ...]:
        host, port = self.address.rsplit(":", 1)
        return (f"--nnodes={self.count}", f"--node-rank={self.rank}", f"--master-addr={host}", f"--master-port={port}")


@dataclass(frozen=True)
class Plan:
    """A study: its runs, each after those that it needs, and the folder with all their outputs."""

    name: str
    manifest: str
    """The file that it was made from."""
    output: Path
    runs: tuple[Run, ...]
    cost: str = ""
    """The cost according to the manifest."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Task -> its backbones, chosen by results of an earlier task: ``by``, ``chosen`` and all ``means``."""
    pending: Mapping[str, str] = field(default_factory=dict)
    """Task that will choose its backbones -> the task it chooses by; its runs join the plan once that one is done."""

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for run in self.runs:
            if run.key in earlier:
                raise InputError(f"two runs are called {run.key}: give one of them another name")
            if missing := set(run.needs) - earlier:
                raise InputError(f"{run.key} needs {', '.join(sorted(missing))}, which is not before it")
            earlier.add(run.key)

    @classmethod
    def read(cls, output: Path) -> Plan:
        """Read the plan in ``output``."""
        path = output / "plan.json"
        if not path.exists():
            raise InputError(f"no plan in {output}: run `robust-backbones sweep setup` first")
        with refuse_damaged(path, "remove it, and give `robust-backbones sweep setup` again"):
            content = json.loads(path.read_text())
            runs = tuple(Run(**_with_tuples(row)) for row in content["runs"])
            plan = cls(**{**content, "output": output, "runs": runs})
            for made, types in [(plan, _TYPES), *((run, _TYPES_OF_RUNS) for run in runs)]:
                check_types(made, types)
            return plan

    def set_up(self) -> bool:
        """Write the plan into its folder; False if it is there already. The caller holds the folder's lock.

        Raises:
            InputError: the folder belongs to another manifest, or holds something else; a task that has begun would
                have other backbones.
        """
        if (self.output / "plan.json").exists():
            held = Plan.read(self.output)
            if held.manifest != self.manifest and Path(held.manifest).exists():
                raise InputError(
                    f"{self.output} is the folder of another manifest, {held.manifest}: give another --output"
                )
            if held == self:
                return False
            for task, choice in held.choices.items():
                # A plan of before ``task`` was noted has it as the group, where no protocol follows it.
                begun = [r.key for r in held.runs if task == (r.task or r.group) and held.folder(r).exists()]
                if begun and self.choices.get(task) != choice:
                    raise InputError(
                        f"{begun[0]} has begun, and task {task} would now choose otherwise, or later: leave the tasks "
                        f"in {self.manifest} as they were, or give another --output"
                    )
        elif any(path.name not in _OURS and path.name[0] != "." for path in self.output.iterdir()):
            raise InputError(f"{self.output} is not empty and holds no study: give another --output")
        self.write()
        return True

    def write(self) -> None:
        write_json(self.output / "plan.json", {**asdict(self), "output": str(self.output)})

    def run(self, key: str) -> Run:
        for run in self.runs:
            if run.key == key:
                return run
        raise InputError(f"no run is called {key} in {self.output}: it was set up anew without it")

    def folder(self, run: Run) -> Path:
        """The folder of the verb's output, which the verb creates itself."""
        return self.output / "runs" / run.key

    def job(self, run: Run) -> Path:
        """The folder of the sweep's notes about the run: its lock, its last attempt, and its output."""
        return self.output / "jobs" / run.key

    def log(self, run: Run) -> Path:
        return self.job(run) / "log.txt"

    def note(self, run: Run) -> Path:
        """The file that names the run's cluster job, as long as it is one."""
        return self.job(run) / "job.json"

    def is_done(self, run: Run) -> bool:
        return all((self.folder(run) / result).exists() for result in run.results)

    def records(self, run: Run) -> list[Path]:
        """The records that the run has written."""
        paths = [self.folder(run) / result for result in run.results]
        return [path for path in paths if path.name == "record.json" and path.exists()]

    def states(self) -> dict[str, str]:
        """One of ``STATES`` for every run, from its files.

        A run without a record, such as a conversion, is also done once all runs that need it are.
        """
        found: dict[str, str] = {}
        users: dict[str, list[Run]] = {}
        for run in self.runs:
            for key in run.needs:
                users.setdefault(key, []).append(run)
        for run in self.runs:
            own = [] if "record.json" in run.results else users.get(run.key, [])
            if self.is_done(run) or (own and all(map(self.is_done, own))):
                found[run.key] = "done"
            elif owner_of(self.job(run) / "lock.json"):
                found[run.key] = "running"
            elif attempt := Attempt.read(self.job(run)):
                interrupted = attempt.status in (None, 0, PreemptedError.exit_status)
                found[run.key] = "preempted" if interrupted else "failed"
            else:
                found[run.key] = "ready" if all(found[key] == "done" for key in run.needs) else "waiting"
        return found

    def progress(self, run: Run) -> float:
        """The finished fraction of the run, 0 to 1."""
        folder = self.folder(run)
        if self.is_done(run):
            return 1.0
        if run.kind == "detect":
            return min(1.0, (_last_row(folder / "metrics.json").get("iteration", -1) + 1) / run.work)
        if run.kind == "pretrain":
            epochs, step = _last_row(folder / "metrics.jsonl"), _last_row(folder / "steps.jsonl")
            if not epochs.get("step"):  # how many steps make an epoch is not known yet
                return 0.0
            done = max(step.get("step", 0), epochs["step"]) / epochs["step"]
            return min(1.0, done * epochs.get("epoch", 0) / run.work)
        return len(self.records(run)) / len(run.results)

    def last_line(self, run: Run) -> str:
        """The last output of the run: its error, which torchrun hides under its own, or the last line."""
        lines = _tail(self.log(run)).replace("\r", "\n").split("\n")  # progress bars go back to the line's beginning
        lines = [line.strip() for line in lines if line.strip()]
        start = max((place for place, line in enumerate(lines) if line.startswith(ATTEMPT)), default=0)
        errors = [line for line in lines[start:] if line.startswith("error: ")]
        return (errors or lines or [""])[-1]

    def pace(self, run: Run, state: str) -> float | None:
        """Seconds that the whole run takes, by its records or its last attempt; None if neither says."""
        attempt = Attempt.read(self.job(run))
        if attempt and state == "running":
            attempt = replace(attempt, seconds=time.time() - attempt.started, reached=self.progress(run))
        if self.is_done(run) and (records := self.records(run)):  # asked last: a run may end while it is looked at
            return sum(map(_seconds, records))
        return attempt.seconds / (attempt.reached - attempt.progress) if attempt and attempt.has_pace else None

    def seconds_left(self, states: Mapping[str, str]) -> dict[str, float | None]:
        """The remaining seconds of each run that is not done; None if there is no pace of it or of its group.

        A run's pace is its own since it was last started, else the average of its group.
        """
        own = {run.key: self.pace(run, states[run.key]) for run in self.runs}
        known: dict[str, list[float]] = {}
        for run in self.runs:
            if (pace := own[run.key]) is not None:
                known.setdefault(run.group, []).append(pace)
        left: dict[str, float | None] = {}
        for run in self.runs:
            if states[run.key] != "done":
                pace = own[run.key] or (fmean(known[run.group]) if run.group in known else None)
                left[run.key] = None if pace is None else pace * (1 - self.progress(run))
        return left

    def time_left(self, states: Mapping[str, str]) -> float | None:
        """Seconds until all is done, with as many runs at a time as now; None if unknown.

        Conversions are left out, as they take a minute at most.
        """
        left = self.seconds_left(states)
        own = [left[run.key] for run in self.runs if run.key in left and run.kind != "convert"]
        known = [seconds for seconds in own if seconds is not None]
        running = sum(state == "running" for state in states.values())
        return sum(known) / max(1, running) if len(known) == len(own) else None


@dataclass(frozen=True)
class Attempt:
    """The last attempt of a run; ``job/attempt.json``."""

    started: float
    """Seconds since the epoch."""
    progress: float
    """Of the run, at the start."""
    status: int | None = None
    """Its exit status; None while it runs, and if it was killed."""
    seconds: float = 0.0
    """Its duration."""
    reached: float = 0.0
    """Progress of the run, at the end."""

    @property
    def has_pace(self) -> bool:
        return self.seconds > 0 and self.reached > self.progress

    @classmethod
    def read(cls, job: Path) -> Attempt | None:
        path = job / "attempt.json"
        with refuse_damaged(path, "remove it, and launch the study again"), suppress(FileNotFoundError):
            attempt = cls(**json.loads(path.read_text()))
            check_types(attempt, _TYPES_OF_ATTEMPTS)
            return attempt
        return None

    def write(self, job: Path) -> None:
        write_json(job / "attempt.json", asdict(self))


_TYPES, _TYPES_OF_RUNS, _TYPES_OF_ATTEMPTS = map(get_type_hints, (Plan, Run, Attempt))


def count(states: Iterable[str]) -> dict[str, int]:
    """How many runs are in each state."""
    found = list(states)
    return {state: found.count(state) for state in STATES}


def _with_tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_row(path: Path) -> dict[str, float]:
    """The numbers in the last complete line of a file of JSON rows; a kill can truncate the line after it."""
    for line in reversed(_tail(path).split("\n")):
        try:
            row = json.loads(line)
        except DAMAGED:
            continue
        if isinstance(row, dict):
            return {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {}


def _seconds(path: Path) -> float:
    """How long a run took, by its record."""
    with refuse_damaged(path, "remove it, or make its run again"):
        seconds = json.loads(path.read_text())["seconds"]
        if not 0 <= seconds < 2**64:
            raise ValueError(f"seconds {seconds}")
        return float(seconds)
