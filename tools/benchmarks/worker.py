"""The process behind a Way: makes its Side, and then works, times and tells when asked, one line of JSON each."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

import numpy as np
import torch
from torch.autograd import DeviceType

from benchmarks.turns import Side

GPU_STEPS = 10


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    start = json.loads(sys.stdin.readline())
    torch.set_num_threads(start["threads"])
    module, function = start["make"].split(":")
    side: Side = getattr(importlib.import_module(f"benchmarks.{module}"), function)(
        **start["options"], device=start["device"]
    )
    _answer(answers, {})
    timed = _on_gpu if start["device"] == "cuda" else _on_cpu
    for line in sys.stdin:
        question = json.loads(line)
        if "run" in question:
            seconds, wall = timed(side)
            _give_memory_back()
            _answer(answers, {"seconds": seconds, "wall": wall})
        elif "kernels" in question:
            _answer(answers, {"kernels": kernel_seconds(side)})
        else:
            np.savez(question["result"], **side.result())
            _give_memory_back()
            _answer(answers, {})


def _on_cpu(side: Side) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    side.run()
    return time.process_time() - processor, time.perf_counter() - wall


def _on_gpu(side: Side) -> tuple[float, float]:
    """The mean of ten, after one that does not count: it asks for the memory that the turn before gave back."""
    side.run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()
    for _ in range(GPU_STEPS):
        side.run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / GPU_STEPS, (time.perf_counter() - wall) / GPU_STEPS


def kernel_seconds(side: Side) -> float:
    """Of one turn, the sum over its kernels: for the rest of its time the GPU waited for the host."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        side.run()
        torch.cuda.synchronize()
    events = profile.key_averages()
    return sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / 1e6


def _give_memory_back() -> None:
    """All workers live at once, and only one works: what the others keep would be missing."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _answer(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
