"""``python -m robust_backbones.sweep.runner OUTPUT KEY PROCESSES [MACHINES RANK ADDRESS]``: one run, in this process.

It holds the run's lock, so that no run is at work twice, whoever starts it, and exits with the run's status. With
several machines, the first one does this.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError
from robust_backbones.runs.locks import HeldError, lock
from robust_backbones.sweep.plan import Attempt, Machines, Plan


def main(arguments: Sequence[str]) -> int:
    output, key, processes, *where = arguments
    plan = Plan.read(Path(output))
    run = plan.run(key)
    job = plan.job(run)
    machines = Machines(int(where[0]), int(where[1]), where[2]) if where else None
    command = run.command(int(processes), machines)
    if machines and machines.rank:
        return 0 if plan.is_done(run) else call(command)
    try:
        with lock(job / "lock.json"):
            if plan.is_done(run):
                return 0
            attempt = Attempt(time.time(), plan.progress(run))
            attempt.write(job)
            status = call(command)
            if status == 0 and not plan.is_done(run):
                missing = [result for result in run.results if not (plan.folder(run) / result).exists()]
                print(f"error: it ended with status 0, but wrote no {', '.join(missing)}", file=sys.stderr)
                status = TrainingFailedError.exit_status
            seconds, reached = time.time() - attempt.started, plan.progress(run)
            replace(attempt, status=status, seconds=seconds, reached=reached).write(job)
            return status
    except HeldError as error:
        print(f"error: {error}", file=sys.stderr)
        return PreemptedError.exit_status  # whoever asked may ask again


def call(command: Sequence[str]) -> int:
    """Run a module with its arguments, as ``python -m`` would; returns its exit status.

    It runs in this process, so that the lock's owner is the process that works, and ends with it.
    """
    sys.argv = [*command]
    sys.path[0] = os.getcwd()
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        print(exit.code, file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        # torchrun's way to say that it was asked to stop
        return PreemptedError.exit_status if type(error).__name__ == "SignalException" else 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
