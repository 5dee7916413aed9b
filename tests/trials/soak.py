"""Train, evaluate and resume for hours in one process: its memory, files, threads and children stay what they are.

    python tests/trials/soak.py --minutes 120 --record soak.json [--figure soak]

A round trains a classifier and a detector, each stopped by a signal at its first checkpoint and resumed, and evaluates
both; what it has written is removed. After each round the process is measured. The first quarter warms up; after it the
memory may grow by less than 1 % (the median of the last quarter against that of the second) and nothing else at all.
Exit status: 0 it stayed, 1 it grew or a command failed. ``--figure`` draws RECORD, also one that is there already
(``--minutes 0``).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from robust_backbones.errors import PreemptedError
from robust_backbones.runs.files import write_json
from robust_backbones.runs.record import versions
from tests.trials import commands

STOPPED = ("pretrain", "train")
ROUND = (*STOPPED, "evaluate classifier", "evaluate detector")
Sample = dict[str, float]


def one_round(root: Path, folder: Path) -> int:
    """How many of its commands were stopped and resumed: a signal may come too late."""
    resumed = 0
    for name in ROUND:
        output = folder / name.replace(" ", "_")
        line = commands.arguments(name, root, output)
        if name in STOPPED:
            killer = threading.Thread(target=_stop_at_checkpoint, args=(output,), daemon=True)
            killer.start()
            status = commands.call(line, root)
            killer.join()
            resumed += status == PreemptedError.exit_status
            if status not in (0, PreemptedError.exit_status):
                raise SystemExit(f"{name} ended with status {status}")
        if status := commands.call(line, root):
            raise SystemExit(f"{name} ended with status {status}")
    return resumed


def _stop_at_checkpoint(output: Path) -> None:
    while not any(output.rglob("*.pt")) and not any(output.glob("*.pth")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGUSR1)


def measure(start: float) -> Sample:
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "minutes": (time.monotonic() - start) / 60,
        "memory": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(children),
    }


def judge(samples: list[Sample]) -> dict[str, float]:
    """What grew from the second quarter of the time to the last: memory in percent, the rest in numbers."""
    end = samples[-1]["minutes"]
    second, last = (
        [sample for sample in samples if low * end <= sample["minutes"] <= high * end]
        for low, high in ((0.25, 0.5), (0.75, 1))
    )
    middle = {name: [statistics.median(row[name] for row in rows) for rows in (second, last)] for name in samples[0]}
    growth = {name: after - before for name, (before, after) in middle.items() if name != "minutes"}
    return {**growth, "memory": 100 * growth["memory"] / middle["memory"][0]}


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    from robust_backbones.analysis import figures

    samples = record["samples"]
    figure, (memory, rest) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    minutes = [sample["minutes"] for sample in samples]
    memory.plot(minutes, [sample["memory"] for sample in samples], color=figures.COLORS[1])
    memory.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
    for name, (color, _, line) in zip(("files", "threads", "children"), figures.STYLES, strict=False):
        rest.plot(minutes, [sample[name] for sample in samples], color=color, linestyle=line, label=name)
    rest.set(xlabel="minutes", ylabel="open at once", ylim=(0, None))
    rest.legend()
    caption = f"One process, {len(samples)} rounds of training, resuming and evaluating"
    figures.save(figure, path, samples, caption, f"{caption}: memory, files, threads and children stay level")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--record", type=Path, default=Path("soak.json"))
    parser.add_argument("--figure", type=Path, help="of the files to draw into, without suffix")
    options = parser.parse_args()
    if options.minutes:
        soak(options.minutes, options.record)
    record = json.loads(options.record.read_text())
    if options.figure:
        draw(record, options.figure)
        print(f"drawn as {options.figure}.svg")
    growth = judge(record["samples"])
    steady = growth["memory"] < 1 and max(growth[name] for name in ("files", "threads", "children")) <= 0
    grown = ", ".join(f"{name} {value:+.3g}{' %' * (name == 'memory')}" for name, value in growth.items())
    rounds = f"{len(record['samples'])} rounds, {record['resumed']} runs resumed, in {record['minutes']:.1f} minutes"
    print(f"{rounds}; after the first quarter: {grown}")
    return int(not steady)


def soak(minutes: float, record: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where a run ends before it is stopped
    samples, resumed, start = list[Sample](), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        root, log = Path(place), record.with_suffix(".log")
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            commands.prepare(root, commands.COMMANDS)
            while (time.monotonic() - start) / 60 < minutes:
                resumed += one_round(root, root / "round")
                shutil.rmtree(root / "round")
                samples.append(measure(start))
                found = {
                    "minutes": samples[-1]["minutes"],
                    "resumed": resumed,
                    "samples": samples,
                    "versions": versions(),
                }
                write_json(record, found)
                os.truncate(log, 0)


if __name__ == "__main__":
    sys.exit(main())
