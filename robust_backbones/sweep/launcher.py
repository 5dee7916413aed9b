"""Launches a study: runs in processes of this machine or as cluster jobs, each as soon as those it needs are done.

An interrupted run is resumed; a failed one stops only the runs that need it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robust_backbones.errors import InputError, PreemptedError, plural
from robust_backbones.runs.cluster import ClusterConfig, open_executor, scheduler_errors
from robust_backbones.runs.files import DAMAGED, write_json
from robust_backbones.sweep.plan import ATTEMPT, Machines, Plan, Run, count

KILLED = -signal.SIGKILL
"""Status of a run that ended without reporting one."""
RESTARTS = 5
"""How often one launch resumes a run that was interrupted."""
SPARE = 1.2
"""Factor on a run's expected time: with a time limit, a run is started only if this much is left."""
_CPUS_PER_PROCESS = 4
_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux gives to clients
_QUEUED = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING")


def start_process(
    plan: Plan, key: str, processes: int, environment: Mapping[str, str], machines: Machines | None = None
) -> subprocess.Popen[bytes]:
    """Start one run in a separate process that handles signals; its output is appended to that of earlier attempts."""
    log = plan.log(plan.run(key))
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "robust_backbones.sweep.runner", str(plan.output), key, str(processes)]
    if machines:
        command += [str(machines.count), str(machines.rank), machines.address]
        log = log.with_stem(f"log_{machines.rank}") if machines.rank else log
    with open(log, "ab") as file:
        file.write(f"{ATTEMPT} {time.strftime('%Y-%m-%d %H:%M:%S')}: {key}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches the launcher, which asks it to stop
            env={**os.environ, **environment},
        )


class LocalExecutor:
    """Processes of this machine.

    Args:
        jobs: how many runs work at the same time.
        processes: of each run, one per GPU.
        gpus: those of this machine, with the names of CUDA_VISIBLE_DEVICES; each run gets its own.

    Raises:
        InputError: there are fewer GPUs than the runs need.
    """

    def __init__(self, plan: Plan, *, jobs: int = 1, processes: int = 1, gpus: Sequence[str] = ()) -> None:
        if jobs < 1 or processes < 1:
            raise InputError(f"--jobs {jobs} with --processes {processes} is no run at all: give 1 or more of each")
        if gpus and jobs * processes > len(gpus):
            raise InputError(
                f"--jobs {jobs} with --processes {processes} need {plural(jobs * processes, 'GPU')}, and {len(gpus)} "
                "were found: give lower --jobs or --processes"
            )
        self._plan, self._processes = plan, processes
        self._slots: list[subprocess.Popen[bytes] | None] = [None] * jobs
        if gpus:
            self._environments = [
                {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * processes : (slot + 1) * processes])}
                for slot in range(jobs)
            ]
        else:  # threads of several runs that share cores wait for each other
            threads = max(1, (os.cpu_count() or 1) // (jobs * processes))
            self._environments = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * jobs

    def running(self) -> dict[str, Handle]:
        """Runs started by an earlier launch, for which this one has to wait."""
        return {}

    def start(self, runs: Sequence[Run]) -> dict[str, Handle]:
        """Start as many of ``runs`` as there is room for, in order."""
        free = [slot for slot, held in enumerate(self._slots) if held is None or held.poll() is not None]
        started: dict[str, Handle] = {}
        for slot, run in zip(free, runs, strict=False):
            process = start_process(self._plan, run.key, self._processes, self._environments[slot])
            started[run.key] = self._slots[slot] = process
        return started


@dataclass
class ClusterJob:
    """One run, called by submitit on each of its machines, and again after an interruption."""

    output: Path
    key: str
    processes: int
    nodes: int = 1
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        self._process = start_process(Plan.read(self.output), self.key, self.processes, {}, self._machines())
        return self._process.wait()

    def checkpoint(self) -> Any:
        """What to submit when the scheduler takes the machine away: the same job, once the run has saved its state.

        Called by a signal handler during ``__call__``: Popen's own methods would deadlock here.
        """
        import submitit

        if self._process is not None:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self._process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(ClusterJob(self.output, self.key, self.processes, self.nodes))

    def _machines(self) -> Machines | None:
        if self.nodes == 1:
            return None
        import submitit

        job = submitit.JobEnvironment()
        # The same port everywhere, and another one for other jobs on the same machine.
        port = _FIRST_PORT + zlib.crc32(f"{job.job_id} {self.key}".encode()) % _PORTS
        return Machines(self.nodes, job.node, f"{job.hostnames[0]}:{port}")


def _job_in(note: Path) -> str:
    with suppress(*DAMAGED):
        job = json.loads(note.read_text())["job"]
        if job and isinstance(job, str):
            return job
    raise InputError(f"{note} names no job of the cluster: see that none of its run is queued, and remove it")


@dataclass(frozen=True)
class _Submitted:
    job: Any
    note: Path

    def poll(self) -> int | None:
        """The return value of the job's function, even if the run died too early to note it itself."""
        if not self.job.done():
            return None
        self.note.unlink(missing_ok=True)
        first = self.job.task(0)  # of several machines; only it has the run's lock
        with suppress(RuntimeError):  # all of submitit's own: the scheduler has ended it, or it could not be put back
            if first.paths.result_pickle.exists():
                return int(first.result())
        return KILLED


Handle = subprocess.Popen[bytes] | _Submitted
"""A started run; ``poll`` returns its exit status once it has ended, negative if it was killed."""


class ClusterExecutor:
    """Jobs of a cluster, by submitit; runs that are ready together become one array.

    Conversions run in processes of this machine: they take a minute and no GPU, and often need the network, which the
    machines of a cluster lack.

    Args:
        cluster: with its executor; ``processes`` is for each run, on each of ``nodes`` for those that can use several.
        jobs: how many of an array work at the same time.
        gpus: False requests none.
    """

    def __init__(self, plan: Plan, cluster: ClusterConfig, *, jobs: int = 256, gpus: bool = True) -> None:
        self._plan, self._cluster, self._jobs, self._gpus = plan, cluster, jobs, gpus
        self._here = LocalExecutor(plan)

    def running(self) -> dict[str, Handle]:
        if self._cluster.executor != "slurm":
            return {}
        # Says before the conversions, not after them, that Slurm or submitit is missing.
        open_executor(self._cluster, self._folder, name=self._plan.name, tasks=1, gpus=0, cpus_per_task=1)
        import submitit

        found: dict[str, Handle] = {}
        for run in self._plan.runs:
            note = self._plan.note(run)
            if note.exists() and not self._plan.is_done(run):
                job = submitit.SlurmJob(self._folder, _job_in(note))
                if job.state.split()[0] in _QUEUED:
                    found[run.key] = _Submitted(job, note)
        return found

    def start(self, runs: Sequence[Run]) -> dict[str, Handle]:
        started = self._here.start([run for run in runs if run.kind == "convert"])
        for kind in dict.fromkeys(run.kind for run in runs if run.kind != "convert"):
            started |= self._submit([run for run in runs if run.kind == kind], kind)
        return started

    def _submit(self, runs: Sequence[Run], kind: str) -> dict[str, Handle]:
        cluster = self._cluster if runs[0].is_distributed else replace(self._cluster, nodes=1)
        processes = 1 if kind == "transfer" else cluster.processes
        executor = open_executor(
            cluster,
            self._folder,
            name=f"{self._plan.name}-{kind}",
            tasks=1,  # the verbs start their processes themselves
            gpus=processes if self._gpus else 0,
            cpus_per_task=_CPUS_PER_PROCESS * processes,
            parallel=self._jobs,
        )
        with scheduler_errors(self._cluster), executor.batch():
            output = self._plan.output.absolute()
            jobs = [executor.submit(ClusterJob(output, run.key, processes, cluster.nodes)) for run in runs]
        started: dict[str, Handle] = {}
        for run, job in zip(runs, jobs, strict=True):
            write_json(self._plan.note(run), {"job": job.job_id})
            started[run.key] = _Submitted(job, self._plan.note(run))
        return started

    @property
    def _folder(self) -> Path:
        return self._plan.output / "cluster"


def launch(
    plan: Plan,
    executor: LocalExecutor | ClusterExecutor,
    *,
    minutes: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
    pause: float = 1.0,
) -> int:
    """Run all of ``plan`` that is not done; the caller holds the lock of its folder.

    Args:
        minutes: start only runs that should end within this time, by the pace of earlier runs of their group. A group
            without a known pace starts one run. Runs still at work shortly before the end are asked to stop.
        stop: true once this process was asked to stop. Runs are then asked to stop, and waited for.
        pause: seconds between checks of the runs.

    Returns:
        the exit status: 0 all are done, 1 some failed, 75 asked to stop, or out of time.
    """
    deadline = time.monotonic() + 60 * minutes * 0.95  # the rest is for the runs to write their states
    runs = {run.key: run for run in plan.runs}
    handles, failed, starts = executor.running(), set[str](), Counter[str]()
    stopping, too_long = False, 0
    while True:
        for key, handle in [*handles.items()]:
            if (status := handle.poll()) is None:
                continue
            del handles[key]
            if plan.is_done(runs[key]):
                say(f"done: {key}")
            elif stopping:
                say(f"stopped: {key}")
            elif (status < 0 or status == PreemptedError.exit_status) and starts[key] <= RESTARTS:
                say(f"interrupted, to be resumed: {key}")
            else:
                failed.add(key)
                say(f"failed: {key}: {plan.last_line(runs[key])} (see {plan.log(runs[key])})")
        out_of_time = time.monotonic() > deadline
        if (stop() or out_of_time) and not stopping:
            stopping = True
            for key, handle in [*handles.items()]:
                if isinstance(handle, subprocess.Popen):
                    handle.terminate()
                else:  # a job stays the cluster's: the next launch finds it there
                    del handles[key]
            why = "out of time" if out_of_time else "asked to stop"
            say(f"{why}: waiting for the state of {plural(len(handles), 'run')}")
        states = plan.states()
        if not stopping:
            ready = [
                run
                for run in plan.runs
                if states[run.key] in ("ready", "preempted", "failed")
                and run.key not in handles
                and run.key not in failed
                and all(states[key] == "done" for key in run.needs)
            ]
            fitting = _fitting(plan, states, ready, handles, deadline - time.monotonic())
            too_long = len(ready) - len(fitting)
            started = executor.start(fitting)
            handles |= started
            starts.update(list(started))
            for key in started:
                say(f"started: {key}")
        # Runs that others have started, by hand or from a launcher that was killed, end by themselves.
        elsewhere = [key for key, state in states.items() if state == "running" and key not in handles]
        if not handles and (stopping or not elsewhere):
            break
        time.sleep(pause)
    found = count(plan.states().values())
    left = len(plan.runs) - found["done"]
    text = f"{found['done']} of {plural(len(plan.runs), 'run')} done"
    text += f", {len(failed)} failed" if failed else ""
    text += f", {left - len(failed)} left" if left > len(failed) else ""
    text += f"; {too_long} would not end in time" if too_long and not stopping else ""
    text += f"; {', '.join(plan.pending)} will choose by them" if plan.pending else ""
    say(text + (": give the same command again" if left else ""))
    return 0 if not left else PreemptedError.exit_status if stopping or (too_long and not failed) else 1


def _fitting(
    plan: Plan, states: Mapping[str, str], ready: Sequence[Run], running: Iterable[str], seconds: float
) -> list[Run]:
    """Those of ``ready`` that should end within ``seconds``; of a group without a pace the first, unless one runs."""
    if seconds == math.inf:
        return [*ready]
    expected = plan.seconds_left(states)
    measuring = {plan.run(key).group for key in running}
    fitting = []
    for run in ready:
        if (left := expected[run.key]) is None and run.group not in measuring:
            measuring.add(run.group)
            fitting.append(run)
        elif left is not None and SPARE * left < seconds:
            fitting.append(run)
    return fitting
