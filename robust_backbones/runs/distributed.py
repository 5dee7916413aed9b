"""Several processes that train one network: what they add up, agree on and gather; one process is the plain case."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


@dataclass(frozen=True)
class Processes:
    """This process's place among ``size`` equal ones; every method is a collective call that all must make."""

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

    def agree(self, value: Any) -> Any:
        """The main process's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank; the whole list arrives everywhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun (or a Slurm task) announces in the environment; alone when it does not.

    Whoever has joined already stays so.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), size)
        return
    # An evaluation's last batches can lie on one process alone for a while; half an hour still finds a dead one.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """``cuda`` -> this process's own GPU of its machine; ``cpu`` as it is."""
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch statistics taken over the batches of all processes, so that their number does not matter."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synchronize_on_cpu(model, nn.BatchNorm2d)


def synchronize_on_cpu(model: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """``model`` whose batch norms of type ``layer``, torch's SyncBatchNorm among them, synchronise without a GPU."""
    for module in model.modules():
        if isinstance(module, layer):
            module.__class__ = _CpuSyncBatchNorm
    return model


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm does, which is for GPUs alone; written for clarity, not for speed."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        x = input.float()
        count = all_reduce(torch.tensor(float(x.numel() // x.shape[1])))
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centered = x - mean[:, None, None]
        variance = all_reduce((centered**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)
        normalized = centered * torch.rsqrt(variance + self.eps)[:, None, None]
        return (normalized * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


def leave_stop_signals_to_main() -> None:
    """For data workers: schedulers signal every process; the main one answers, and needs its workers until it is done.

    PyTorch gives each worker a handler of its own, so that it is of no use to call this before they have started.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_data_workers() -> None:
    """At its end Python stops daemons by SIGTERM and waits: for ever, where they leave that to the main process.

    A process that ``multiprocessing`` has started has to call this at its end; in others it comes by itself.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call it an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave(status: int) -> NoReturn:
    """End this process, one of several, with ``status``: handlers run, but the interpreter is not taken down.

    Gloo's threads outlive ``destroy_process_group`` where DistributedDataParallel holds the group. One of them that
    lets go of a tensor while Python ends aborts the process, and a run that had succeeded fails (pytorch issue 190489).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Whether the machine has asked this process to stop."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[StopRequest]:
    """Turn these signals into a flag to look at."""
    request = StopRequest()

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = number

    try:
        previous = {number: signal.signal(number, remember) for number in signals}
    except ValueError:  # only the main thread may set handlers; in another one nothing can be asked
        previous = {}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
