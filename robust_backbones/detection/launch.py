"""The processes of a detector's training: started here, as by Detectron2, or by torchrun and joined here."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import detectron2.engine
import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError, disk_error, plural
from robust_backbones.runs.distributed import TIMEOUT, end_process, fork_workers, join_processes, local_device
from robust_backbones.runs.signals import STOP_SIGNALS, StopRequest, handled


def scale_to_processes(cfg: CfgNode, *, num_gpus: int, num_machines: int) -> CfgNode:
    """``cfg`` scaled to the number of processes that will run it, if SOLVER.REFERENCE_WORLD_SIZE is set.

    Detectron2 then keeps the images per process: batch size and learning rate grow with the processes, iterations
    shrink.
    """
    processes = _torchrun_size() or num_gpus * num_machines
    if processes < 1 or min(num_gpus, num_machines) < 1:
        raise InputError(
            f"--num-gpus {num_gpus} on --num-machines {num_machines} is no process at all: give 1 or more; without "
            "a GPU, --num-gpus 1 (the default) runs on the CPU"
        )
    gpus = torch.cuda.device_count()
    if gpus and cfg.MODEL.DEVICE == "cpu" and processes > 1:
        raise InputError(
            "several processes use the GPUs: take MODEL.DEVICE cpu away, or hide them: CUDA_VISIBLE_DEVICES="
        )
    if gpus and num_gpus > gpus:
        raise InputError(f"--num-gpus {num_gpus}, but {plural(gpus, 'GPU')} found: give --num-gpus {gpus}")
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if batch % (reference or processes):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be divided among {reference or processes} processes: give a multiple"
        )
    return DefaultTrainer.auto_scale_workers(cfg, processes)


def _torchrun_size() -> int:
    """How many processes torchrun has started; 0 if it was not used."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def launch(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    num_gpus: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
) -> None:
    """Run ``function(*arguments)`` in ``num_gpus`` processes on each of ``num_machines``, one process per GPU.

    Without CUDA they are CPU processes. Under torchrun its processes are joined and these numbers are ignored.

    An exception of ``function`` in a started process is printed there, and this process exits with its status.
    """
    if _torchrun_size() > 1:
        _join(function, arguments)
        return
    if num_machines == 1 and machine_rank:
        raise InputError(
            f"of one machine there is no --machine-rank {machine_rank}: give --num-machines too, or a --machine-rank "
            "from 0 to 0"
        )
    if (num_machines > 1 and dist_url == "auto") or not 0 <= machine_rank < num_machines:
        raise InputError(
            f"on {num_machines} machines give --dist-url tcp://FIRST_MACHINE:PORT, the same everywhere, and a "
            f"--machine-rank from 0 to {num_machines - 1}"
        )
    if num_gpus * num_machines == 1:
        function(*arguments)
        return
    if not torch.cuda.is_available() and num_gpus > (cores := os.cpu_count() or 1):  # each holds a detector
        raise InputError(
            f"--num-gpus {num_gpus}, but no GPU was found, and {cores} CPU cores: give --num-gpus 1, for one process "
            "on the CPU"
        )
    with _stop_signals_for_children() as stop:
        try:
            detectron2.engine.launch(
                _in_child,
                num_gpus,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(function, arguments),
                timeout=TIMEOUT,
            )
        except ProcessException as error:
            if isinstance(error, ProcessExitedException) and error.exit_code > 0:  # it has said why
                sys.exit(error.exit_code)
            if stop:
                raise PreemptedError("asked to stop before training had begun: start it again") from None
            raise TrainingFailedError(f"a process of the run failed: {error}") from None


def _join(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with join_processes(local_device("cuda" if torch.cuda.is_available() else "cpu")):
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        try:
            function(*arguments)
        except PreemptedError:
            if not comm.is_main_process():  # all stop together: one says so
                sys.exit(PreemptedError.exit_status)
            raise


def _in_child(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    status = 0
    fork_workers()
    try:
        function(*arguments)
    except (InputError, OSError) as problem:
        error = problem if isinstance(problem, InputError) else disk_error(problem)
        if error is None:
            raise
        if comm.is_main_process() or not isinstance(error, PreemptedError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, PreemptedError):
            comm.synchronize()  # the first to leave has the others killed, who may still be writing
        status = error.exit_status
    end_process(status)


@contextmanager
def _stop_signals_for_children() -> Iterator[StopRequest]:
    """Forward ``STOP_SIGNALS`` to the processes that this one has started, and remember that they were received."""
    request = StopRequest()

    def forward(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    with handled(forward, STOP_SIGNALS):
        yield request
