"""Studies to expand, and studies of stubs to launch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from robust_backbones.sweep.expand import expand
from robust_backbones.sweep.launcher import LocalExecutor, launch
from robust_backbones.sweep.manifest import read_manifest
from robust_backbones.sweep.plan import Plan, Run
from tests.conftest import ROOT

FPN = str(ROOT / "detectron_configs/quick/faster_rcnn_R_50_FPN_voc_instant.yaml")
SYNCBN = str(ROOT / "detectron_configs/protocols/syncbn.yaml")
SMALL: dict[str, Any] = {
    "name": "study",
    "seeds": [0, 1],
    "pretraining": {"robust": {"data": "images", "arch": "resnet18", "threat_model": "L2:0.5", "epochs": 2}},
    "backbones": {"robust": {"pretrain": "robust"}, "standard": {"published": "resnet50_l2_eps0"}},
    "tasks": {
        "voc": {"config_files": [FPN], "overrides": {"SOLVER.AMP.ENABLED": False}},
        "flowers": {"transfer": "probe", "dataset": "flowers", "options": {"data_root": "data"}},
    },
}


def with_(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``content`` with another value at a path of names, parted by slashes."""
    changed = json.loads(json.dumps(content))
    *nodes, last = path.split("/")
    node = changed
    for name in nodes:
        node = node.setdefault(name, {})
    node[last] = value
    return changed


def planned(folder: Path, content: dict[str, Any]) -> Plan:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return expand(read_manifest(path, folder / "output"))


def keys(plan: Plan) -> dict[str, str]:
    """Keys by their readable part."""
    return {run.key.rsplit("-", 1)[0]: run.key for run in plan.runs}


STUB = """
import fcntl, os, signal, sys, time
ledger, folder, mode = sys.argv[1:4]
def note(what):
    with open(ledger, "a") as file:
        file.write(f"{what} {os.path.basename(folder)}\\n")
os.makedirs(folder, exist_ok=True)
note("start")
if os.path.exists(folder + "/record.json"):
    note("AGAIN")
alone = open(folder + "/alone", "w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("TWICE")
if mode == "fail":
    sys.exit("error: this one fails")
if mode == "empty":
    sys.exit(0)
if mode == "once" and not os.path.exists(folder + "/begun"):
    open(folder + "/begun", "w").close()
    sys.exit(75)
if mode == "wait":
    def stop(number, frame):
        note("stop")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    note("wait")
    time.sleep(60)
if mode == "moment":
    time.sleep(0.02)
with open(folder + "/.record.tmp", "w") as file:
    file.write('{"seconds": 2.0}')
os.replace(folder + "/.record.tmp", folder + "/record.json")
"""
LAUNCHER = """
import signal, sys
from pathlib import Path
from robust_backbones.sweep.launcher import LocalExecutor, launch
from robust_backbones.runs.locks import lock
from robust_backbones.sweep.plan import Plan
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
plan = Plan.read(Path(sys.argv[1]))
with lock(plan.output / "lock.json"):
    sys.exit(launch(plan, LocalExecutor(plan, jobs=int(sys.argv[2])), stop=lambda: bool(asked), pause=0.02))
"""


def stubs(folder: Path, modes: dict[str, str], needs: dict[str, tuple[str, ...]] | None = None) -> Plan:
    """A plan of runs of ``STUB``, by name and mode."""
    (folder / "stub.py").write_text(STUB)
    output = folder / "output"
    runs = tuple(
        Run(key, "stub", "stub", ("stub", str(folder / "ledger"), str(output / "runs" / key), mode), needs=n)
        for key, mode in modes.items()
        for n in [(needs or {}).get(key, ())]
    )
    plan = Plan("stubs", "stubs.yaml", output, runs)
    plan.write()
    return plan


def ledger(plan: Plan) -> list[str]:
    path = plan.output.parent / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def launched(plan: Plan, *, jobs: int = 1, **rest: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    return launch(plan, LocalExecutor(plan, jobs=jobs), say=said.append, pause=0.02, **rest), said


def in_process(plan: Plan, jobs: int = 2) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own."""
    with open(plan.output / "launcher.txt", "ab") as file:
        command = [sys.executable, "-c", LAUNCHER, str(plan.output), str(jobs)]
        return subprocess.Popen(command, stdout=file, stderr=file)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _stubs_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
