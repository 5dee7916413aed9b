"""Several processes that train one network: sums, agreement and gathering; also works with one process."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``size`` processes; every method is a collective call that all must make."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def min(self, tensor: Tensor) -> Tensor:
        """The smallest over all processes, elementwise."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, operation)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The main process's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Processes()
TIMEOUT = timedelta(minutes=30)
"""One process alone may evaluate the last images for a while; half an hour still detects a dead one."""


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun (or a Slurm task) sets in the environment; a single process if none are set.

    A process that has already joined stays so.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), size)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process has rank 0 in its run (torchrun's RANK): the one that checks and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device(name: str) -> torch.device:
    """``cuda`` -> this process's own GPU on its machine; ``cpu`` is unchanged."""
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def fork_workers() -> None:
    """In a spawned process, fork its data workers, as any other process does.

    Otherwise they would be spawned too, and each would spend seconds on imports.
    """
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)


def end_process(status: int) -> NoReturn:
    """End this process, one of several, with ``status``: exit handlers run, but Python is not finalised.

    Gloo's threads outlive ``destroy_process_group`` if DistributedDataParallel holds the group. If one of them releases
    a tensor while Python is finalised, the process aborts, and a successful run fails (pytorch issue 190489).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
