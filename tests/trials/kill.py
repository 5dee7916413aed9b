"""Break every command that writes, in every way; resumed to its end, it has written what an unbroken run writes.

    python tests/trials/kill.py --random 200 --inside 100 --disk 30 --writers 20 --rank 4 --world 2 --record kills.json
    python tests/trials/kill.py --random 4 --inside 2 --commands pretrain convert --seed 7

The ways, each given as often as it says, over all --commands in turn:
    random   SIGKILL at a random moment, of all processes of the run or of one of them
    inside   SIGKILL at a sync, rename or link, before it or after; what was not synced yet may be cut
    disk     no file may grow beyond a random size; or, where this is run by root, the disk is full
    writers  the same command two or three times at once
    rank     of torchrun's two processes one is killed: the other has to end within 30 s
    world    killed on two processes and resumed on one, which says so

After one to five of these the same command is given again. It must end with status 0 and without a traceback, leave no
temporary file, and have the checkpoints (by sha256) and the records (but for times) of an unbroken run. Commands run on
tiny networks, in forks of this process, which has imported everything. Exit status: 0 all survived, 1 some were lost;
what was lost is kept in --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import robust_backbones
from robust_backbones.runs.files import write_json
from robust_backbones.runs.record import versions
from robust_backbones.sweep import launcher, runner
from tests.conftest import ROOT
from tests.trials.commands import COMMANDS, arguments, call, prepare

WAYS = ("random", "inside", "disk", "writers", "rank", "world")
_END_SECONDS, _HANG_SECONDS = 30.0, 300.0
_TIMES = re.compile(r"seconds|time|(^|_)eta(_|$)|per_second|since|git_commit")
_BINARY = {".pt", ".pth", ".pkl", ".png", ".svg", ".csv"}


class Lost(Exception):  # noqa: N818
    """Why."""


def fork(function: Callable[[], int], log: Path) -> int:
    """The number of a process of its own that calls ``function``, ends with its status, and prints to ``log``."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = function()
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def tree(pid: int) -> list[int]:
    """The living Python processes among this one and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ours = os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe")
    except OSError:  # a zombie has no exe
        return []
    return [*([pid] if ours else []), *(one for child in children for one in tree(int(child)))]


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def wait(pid: int, seconds: float = _HANG_SECONDS) -> int:
    """The status of a child, killed after so many seconds.

    Raises:
        Lost: it was.
    """
    end = time.monotonic() + seconds
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            for one in tree(pid):
                kill(one)
            os.waitpid(pid, 0)
            raise Lost(f"it did not end within {seconds:.0f} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


class ForkedRun:
    """A run of a sweep in a fork, in place of a new Python; its launcher takes it for a Popen."""

    def __init__(self, plan: Any, key: str, processes: int, environment: Any) -> None:
        log = plan.log(plan.run(key))
        log.parent.mkdir(parents=True, exist_ok=True)
        self.pid = fork(lambda: runner.main([str(plan.output), key, "1"]), log)
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(found[1])
        return self.status

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def run(name: str, root: Path, output: Path, log: Path, *, one: bool = False, by_torchrun: bool = False) -> int:
    """A command in this process and its forks; one of two processes on ``one``, or by torchrun itself."""
    launcher.start_process = ForkedRun
    torch.multiprocessing.start_processes = partial(torch.multiprocessing.start_processes, start_method="fork")
    line = arguments(name, root, output)
    if (by_torchrun or one) and "--num-gpus" in line:
        line[line.index("--num-gpus") + 1] = "1"
    if by_torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(root / "data")}
        return subprocess.run([*command, "-m", "robust_backbones", *line], env=environment, check=False).returncode
    if name == "pretrain on two" and not one:
        return _ranks(lambda: call(line, root), log)
    return call(line, root)


def _ranks(function: Callable[[], int], log: Path) -> int:
    """``function`` in two forks, as torchrun has it; once one fails the other is ended, by force after 20 s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> int:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
        return function()

    left = {fork(partial(rank, number), log) for number in range(2)}
    pid, first = os.wait()
    left.discard(pid)
    if first:
        for other in left:
            os.kill(other, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_, other=other: kill(other))
            signal.alarm(20)
    second = os.wait()[1]
    return os.waitstatus_to_exitcode(first or second)


def hook(counter: Path, fatal: int = 0, generator: random.Random | None = None) -> None:
    """Count in ``counter`` the syncs, renames and links of this process and its forks; number ``fatal`` kills."""

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **rest: Any) -> Any:
            with open(counter, "ab", 0) as file:
                file.write(b".")
                here = file.tell() == fatal
            if not (here and generator):
                return real(*arguments, **rest)
            if generator.random() < 0.3:
                real(*arguments, **rest)
            elif name == "fsync" and generator.random() < 0.5:
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                if path.is_file():
                    os.truncate(path, generator.randrange(path.stat().st_size + 1))
            return os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("fsync", "replace", "link"):
        setattr(os, name, hooked(name, getattr(os, name)))


def limit_files(size: int) -> None:
    """No file of this process may be larger, but for what it prints."""
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert cat.stdin is not None
    for descriptor in (1, 2):
        os.dup2(cat.stdin.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def written(folder: Path) -> dict[str, Any]:
    """What a run has written, by file: the hash of weights and figures; the content of the rest, without times.

    Of detection's metrics.json without losses, which are medians since the process started.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".tmp" in name:
            found[name] = "a temporary file"
        elif path.suffix in _BINARY:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.json":
            found[name] = [
                {key: value for key, value in json.loads(line).items() if "AP" in key or key in ("iteration", "lr")}
                for line in path.read_text().splitlines()
            ]
        elif path.suffix in (".json", ".jsonl") and not name.startswith("jobs/"):
            text = path.read_text()
            try:
                found[name] = timeless(json.loads(text))
            except ValueError:
                found[name] = [timeless(json.loads(line)) for line in text.splitlines()]
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if not _TIMES.search(str(name))}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    names = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    told = []
    for name in names[:3]:
        one, other = (str(side.get(name, "missing")) for side in (expected, found))
        at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), 0)
        told.append(f"{name}: {one[max(0, at - 60) : at + 60]!r} became {other[max(0, at - 60) : at + 60]!r}")
    return "; ".join(told) + f"; {len(names)} files in all" * (len(names) > 3)


class Trial:
    """One command: its unbroken run, and the ways to break it. A way gives how often it did; Lost where that shows."""

    def __init__(self, name: str, root: Path, folder: Path, generator: random.Random) -> None:
        self.name, self.root, self.folder, self.generator = name, root, folder, generator
        self.output, self.log, self.counter = folder / "output", folder / "log.txt", folder / "counter"

    def run_unbroken(self) -> None:
        self.clear()
        start = time.monotonic()
        self.finish(partial(hook, self.counter))
        self.seconds = time.monotonic() - start
        self.expected, self.events = written(self.output), self.counter.stat().st_size
        self.sizes = [path.stat().st_size for path in self.output.rglob("*") if path.is_file()]

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def start(self, setup: Callable[[], object] = lambda: None, **how: bool) -> int:
        def function() -> int:
            setup()
            return run(self.name, self.root, self.output, self.log, **how)

        return fork(function, self.log)

    def said(self, since: int = 0) -> str:
        return self.log.read_bytes()[since:].decode(errors="replace") if self.log.exists() else ""

    def finish(self, setup: Callable[[], object] = lambda: None, **how: bool) -> str:
        """Run to the end; gives what was printed."""
        before = len(self.said().encode())
        status = wait(self.start(setup, **how))
        said = self.said(before)
        last = (said.strip().splitlines() or [""])[-1]
        if status or "Traceback" in said:
            raise Lost(f"given again it ended with status {status}{' and a traceback' * ('Traceback' in said)}: {last}")
        return said

    def chain(self, way: str, most: int) -> int:
        self.clear()
        broken: int = getattr(self, way)(most)
        if way != "world" and broken:
            self.finish()
            if (found := written(self.output)) != self.expected:
                raise Lost(f"not as the unbroken run: {difference(self.expected, found)}")
        return broken

    def await_end(self, family: list[int]) -> None:
        """Of what a killed process has left at work; a sweep's runs go on without their launcher."""
        end = time.monotonic() + (_HANG_SECONDS if self.name == "sweep" else _END_SECONDS)
        while left := [one for pid in family for one in tree(pid)]:
            if time.monotonic() > end:
                for one in left:
                    kill(one)
                raise Lost(f"{_END_SECONDS:.0f} s after a process was killed, others were at work")
            time.sleep(0.02)

    def random(self, most: int) -> int:
        for broken in range(most):
            pid = self.start()
            time.sleep(self.generator.uniform(0, self.seconds))
            family = tree(pid)
            victims = [self.generator.choice(family)] if family and self.generator.random() < 0.3 else family
            if not [victim for victim in victims if kill(victim)]:
                wait(pid)
                return broken
            wait(pid, _HANG_SECONDS if self.name == "sweep" else _END_SECONDS)
            self.await_end(family)
        return most

    def inside(self, most: int) -> int:
        for broken in range(most):
            self.counter.unlink(missing_ok=True)
            fatal, generator = self.generator.randint(1, self.events), random.Random(self.generator.random())
            pid, family = self.start(partial(hook, self.counter, fatal, generator)), set[int]()
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                family |= {*tree(pid)}
                time.sleep(0.02)
            wait(pid)
            self.await_end([*family])
            if not self.counter.exists() or self.counter.stat().st_size < fatal:
                return broken
        return most

    def disk(self, most: int) -> int:
        if not os.geteuid() and self.generator.random() < 0.5:
            size, copy = max(4096, int(self.generator.random() * sum(self.sizes))), self.folder / "copy"
            self.output.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.output], check=True)
            try:
                status = wait(self.start())
                shutil.copytree(self.output, copy, symlinks=True)
            finally:
                subprocess.run(["umount", self.output], check=True)
            self.output.rmdir()
            copy.rename(self.output)
        else:
            status = wait(self.start(partial(limit_files, int(self.generator.random() ** 2 * max(self.sizes)))))
            time.sleep(0.1)  # cat ends after it
        said = self.said()
        if status not in (0, 1, 2) or "Traceback" in said or (status and "error: " not in said):
            raise Lost(f"a full disk gave status {status}: {said[-300:]}")
        return int(status != 0)

    def writers(self, most: int) -> int:
        pids = []
        for _ in range(self.generator.randint(2, 3)):
            pids.append(self.start())
            time.sleep(self.generator.uniform(0, self.seconds) * self.generator.randint(0, 1))
        statuses, said = [wait(pid) for pid in pids], self.said()
        if not {0} <= {*statuses} <= {0, 2} or said.count("in use by") < statuses.count(2) or "Traceback" in said:
            raise Lost(f"writers ended with {statuses}: {said[-300:]}")
        return 1

    def rank(self, most: int) -> int:
        """torchrun itself, in a new Python."""
        pid = self.start(by_torchrun=True)
        while not (ranks := [one for one in tree(pid) if _is_rank(one)]) or not self.output.exists():
            time.sleep(0.05)
        time.sleep(self.generator.uniform(0, self.seconds))
        kill(self.generator.choice(ranks))
        family = tree(pid)
        wait(pid, _END_SECONDS)
        self.await_end(family)
        return 1

    def world(self, most: int) -> int:
        pid = self.start()
        while not [*self.output.glob("checkpoints/step_*.pt"), *self.output.glob("model_0*.pth")]:
            time.sleep(0.01)
        family = tree(pid)
        for victim in family:
            kill(victim)
        wait(pid)
        self.await_end(family)
        said = self.finish(one=True)
        if said.count("started by 2 processes and is resumed by 1") != 1:
            raise Lost(f"resumed on one process it did not say once that it was on 2 processes: {said[:300]}")
        return 1


def _is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for way in WAYS:
        parser.add_argument(f"--{way}", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("lost"))
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(robust_backbones.__path__, "robust_backbones."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tried, lost = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    root = Path(tempfile.mkdtemp(prefix="kill-"))  # forks that run atexit's handlers would remove a TemporaryDirectory
    log = root / "prepared.txt"
    if wait(fork(lambda: prepare(root, options.commands) or 0, log)):
        sys.exit(log.read_text()[-3000:])
    for name in options.commands:
        generator = random.Random(f"{options.seed} {name}")
        trial = Trial(name, root, root / "trials" / name.replace(" ", "_"), generator)

        def lose(way: str, why: Lost, trial: Trial = trial) -> None:
            lost[trial.name, way] += 1
            kept = options.keep / f"{trial.name}-{way}-{options.seed}-{lost[trial.name, way]}".replace(" ", "_")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(trial.folder, kept, symlinks=True)
            print(f"  LOST {way}, kept in {kept}: {why}", flush=True)

        try:
            trial.run_unbroken()
        except Lost as error:
            lose("unbroken", error)
            continue
        print(f"{name}: {trial.seconds:.1f} s, {trial.events} writes unbroken", flush=True)
        for way in WAYS:
            if way in ("rank", "world") and not name.endswith(" on two"):
                continue
            wanted = share(getattr(options, way), name, way, options.commands)
            while tried[name, way] < wanted:
                most = min(generator.randint(1, 5), wanted - tried[name, way])
                try:
                    tried[name, way] += trial.chain(way, most)
                except Lost as error:
                    tried[name, way] += 1
                    lose(way, error)
        told = (f"{way} {tried[name, way] - lost[name, way]} of {tried[name, way]}" for way in WAYS)
        print(f"  survived: {', '.join(told)}", flush=True)
        if options.record:
            rows = [{"command": n, "way": w, "tried": tried[n, w], "lost": lost[n, w]} for n, w in tried]
            write_json(options.record, {"seed": options.seed, "rows": rows, "versions": versions()})
    shutil.rmtree(root)
    print(f"tried {tried.total()}, survived {tried.total() - lost.total()}, lost {lost.total()}")
    return int(lost.total() > 0)


def share(total: int, name: str, way: str, names: list[str]) -> int:
    """How many of ``total`` fall to one of ``names``; only what is on two processes can lose a rank."""
    able = [one for one in names if way not in ("rank", "world") or one.endswith(" on two")]
    return total // len(able) + (able.index(name) < total % len(able))


if __name__ == "__main__":
    sys.exit(main())
