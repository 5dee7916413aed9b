"""Signals that ask a run to stop reach its main process alone, and nothing of the host is changed for it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robust_backbones.errors import PreemptedError
from robust_backbones.runs.signals import stop_for_parent_only, stop_on_signals
from tests.conftest import ROOT, start_fork


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)


def test_signals_are_a_flag_within_the_block_and_the_hosts_after_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        for item in iter(int, 1):
            stop_for_parent_only()
            yield item


def fail_beside_workers() -> None:
    loader = iter(DataLoader(Endless(), num_workers=2))
    next(loader), next(loader)
    for worker in loader._workers:
        for name in ("TERM", "USR1"):  # as a scheduler, which is another process
            subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    for _ in range(20):
        next(loader)
    raise RuntimeError("as training fails")


def test_data_workers_outlive_a_schedulers_signals_and_never_keep_a_process_from_ending(tmp_path: Path) -> None:
    """Not even where an error holds on to them."""
    process = start_fork(fail_beside_workers, tmp_path / "said")
    process.join(300)
    assert process.exitcode == 1
    assert (tmp_path / "said/err").read_text().splitlines()[-1] == "RuntimeError: as training fails"


class Images(Dataset[int]):
    """The process that reads one is ended by a signal."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return number


def start_workers_that_die() -> None:
    with pytest.raises(PreemptedError, match=r"^asked to stop"), stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        next(iter(DataLoader(Images(), num_workers=1)))
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"), stop_on_signals():
        next(iter(DataLoader(Images(), num_workers=1)))


def test_a_worker_that_dies_of_the_signal_while_it_starts_is_no_failure(tmp_path: Path) -> None:
    """Where nobody asked the process to stop, it is."""
    process = start_fork(start_workers_that_die, tmp_path / "said")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "said/err").read_text()


ANYWHERE = """
import os, signal, sys, time
from robust_backbones.commands import cli
def main(arguments):
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun's second one, while the first is answered
        print("cleaned up", flush=True)
cli.run(main)
"""


def test_a_command_asked_to_stop_before_it_runs_says_so(tmp_path: Path) -> None:
    """With the stop status, and what it had begun cleaned up; a process that it forked dies as it would."""
    result = run_script(tmp_path, ANYWHERE)
    assert (result.returncode, result.stdout) == (75, "cleaned up\n")
    assert result.stderr == "error: asked to stop: give the same command again\n"


HOST = """
import atexit, importlib, multiprocessing, pkgutil, signal, sys, time
import torch, torch.distributed, torch.distributed.nn.functional, torch.utils.data, yaml

def daemon(ready):
    signal.signal(signal.SIGTERM, lambda number, frame: (print("ended by SIGTERM", flush=True), sys.exit()))
    ready.set()
    time.sleep(60)

def state():
    return atexit._ncallbacks(), [signal.getsignal(number) for number in range(1, 32)]

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    context.Process(target=daemon, args=(ready,), daemon=True).start()
    ready.wait()
    before = state()
    import robust_backbones.runs
    for module in pkgutil.iter_modules(robust_backbones.runs.__path__):
        importlib.import_module(f"robust_backbones.runs.{module.name}")
    from robust_backbones.cpu.batch_norm import synchronize_batch_norms
    from robust_backbones.runs import distributed, signals
    with signals.stop_on_signals(), distributed.join_processes(torch.device("cpu")) as processes:
        processes.broadcast(1)
    synchronize_batch_norms(torch.nn.BatchNorm2d(3), torch.device("cpu"))
    assert state() == before
"""


def test_the_hosts_handlers_and_daemons_are_left_alone(tmp_path: Path) -> None:
    result = run_script(tmp_path, HOST)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ended by SIGTERM\n"
