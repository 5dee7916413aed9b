"""Runs on a cluster: submitit starts one process per GPU, and restarts the run after preemption or time-out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_backbones.errors import InputError, check_choice, check_positive

EXECUTORS = ("slurm", "local", "debug")


@dataclass(frozen=True)
class ClusterConfig:
    """Where a run is submitted, and the resources it requests."""

    executor: str = ""
    """slurm; local (processes of this machine) or debug (this process) to try a submission; empty: run here and now."""
    nodes: int = 1
    processes: int = 8
    """On each node; with --device cuda, each has a GPU of its own."""
    partition: str = ""
    hours: float = 24.0
    """Time limit of one job; a run that needs more is resumed in another job."""
    restarts: int = 20
    """How often a run may hit its time limit; preemptions do not count."""

    def __post_init__(self) -> None:
        if self.executor:
            check_choice("executor", self.executor, EXECUTORS)
        counts = (self.nodes, self.processes, self.restarts)
        if not all(isinstance(count, int) for count in counts) or min(counts[:2]) < 1 or self.restarts < 0:
            raise InputError("a submission needs whole numbers of nodes and processes >= 1 and of restarts >= 0")
        check_positive(self, "hours")


def open_executor(
    cluster: ClusterConfig, folder: Path, *, name: str, tasks: int, gpus: int, cpus_per_task: int, parallel: int = 256
) -> Any:
    """submitit's executor for jobs of ``tasks`` processes and ``gpus`` GPUs on each node; their logs go to ``folder``.

    Args:
        parallel: how many jobs of an array run at the same time.

    Raises:
        InputError: there is no such cluster, or no submitit.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("a cluster needs the package submitit: pip install 'robust-backbones[slurm]'") from None
    with scheduler_errors(cluster):
        executor = submitit.AutoExecutor(folder, cluster=cluster.executor, slurm_max_num_timeout=cluster.restarts)
        executor.update_parameters(
            name=name,
            nodes=cluster.nodes,
            tasks_per_node=tasks,
            gpus_per_node=gpus,
            cpus_per_task=cpus_per_task,
            timeout_min=round(60 * cluster.hours),
            stderr_to_stdout=True,
            slurm_array_parallelism=parallel,
            **({"slurm_partition": cluster.partition} if cluster.partition else {}),
        )
        return executor


@contextmanager
def scheduler_errors(cluster: ClusterConfig) -> Iterator[None]:
    """Turn errors of the scheduler, or of reaching it, into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # all of submitit's own are RuntimeErrors
        raise InputError(f"cannot submit to {cluster.executor} ({str(error).splitlines()[0]})") from error


def log_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}_jobs")
