"""Conversion of a ResNet-50 as a whole process: seconds and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.turns import TOOLS
from benchmarks.work import Work
from robust_backbones.errors import TrainingFailedError
from robust_backbones.models import BackboneSpec, build_backbone

SECONDS, MEGABYTES = 5.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Conversion(Work):
    """Seconds and memory of tools/convert_backbone.py."""

    name: ClassVar[str] = "conversion"
    title: ClassVar[str] = "Conversion of a ResNet-50"

    rounds: int = 5

    @property
    def remark(self) -> str:
        return "`tools/convert_backbone.py` as a process of its own, start and imports included, with `--no-verify`."

    def measure(self) -> dict[str, Any]:
        self.output.mkdir(parents=True, exist_ok=True)
        source, target = self.output / "resnet50.pth", self.output / "resnet50.pkl"
        torch.save(build_backbone(BackboneSpec("resnet50", 1000)).state_dict(), source)
        empty = [sys.executable, "-c", "import torch, torchvision"]
        convert = [sys.executable, str(TOOLS / "convert_backbone.py"), str(source), str(target), "--no-verify"]
        commands = {"importing torch and torchvision alone": empty, "conversion": convert}
        rows: dict[str, dict[str, Any]] = {
            name: {"way": name, "wall": [], "seconds": [], "megabytes": []} for name in commands
        }
        for turn in range(1 + self.rounds):  # the first one fills the file cache
            for name, command in commands.items():
                target.unlink(missing_ok=True)
                used = _process(name, command)
                if turn:
                    for key, value in used.items():
                        rows[name][key].append(value)
        return self.write({"processes": list(rows.values()), "at_most": {"seconds": SECONDS, "megabytes": MEGABYTES}})


def _process(name: str, command: list[str]) -> dict[str, float]:
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    largest = 0.0
    # The peak that the kernel reports of a finished child counts the parent's memory of before exec.
    while (waited := os.wait4(child.pid, os.WNOHANG))[0] == 0:
        largest = max(largest, _peak(child.pid))
        time.sleep(0.01)
    _, status, used = waited
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise TrainingFailedError(f"{name} ended with status {child.returncode}")
    wall = time.perf_counter() - begin
    return {"wall": wall, "seconds": used.ru_utime + used.ru_stime, "megabytes": largest}


def _peak(process: int) -> float:
    """Megabytes that a running process has held at most; 0 where Linux does not say (any more)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), default=0.0)
