"""A folder holds one run, and one process writes it; a run that never began leaves it to another."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.folders import claim, claimed, own_folder, shared
from robust_backbones.runs.locks import HeldError, Owner
from tests.conftest import ROOT


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    """Claimed once, found again wherever it runs, and refused to every other run."""
    folder, config = tmp_path / "run", {"lr": 0.1, "attack": {"steps": 3}, "sizes": (1, 2), "device": "cpu"}
    assert not claim(folder, config)
    assert not claim(folder, {**config, "device": "cuda"})
    assert not claim(folder, {**config, "views": 2}, {"views": 2})
    (folder / "record.json").touch()
    assert claim(folder, config)
    with pytest.raises(InputError, match=r"another run \(attack.steps is 3 there and 4 here, lr is 0.1 .*, and 1 more"):
        claim(folder, {"lr": 1, "attack": {"steps": 4}, "new": 1, "sizes": []})
    claim(tmp_path / "other", {"checkpoint": "ab" * 32})
    with pytest.raises(InputError, match="checkpoint is ababababab there and cdcdcdcdcd here"):
        claim(tmp_path / "other", {"checkpoint": "cd" * 32})
    with pytest.raises(InputError, match="no run of ours"):
        claim(tmp_path, config)
    for damaged in ("[", "[1]", "\0", "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="cannot read"):
            claim(folder, config)


def claim_at(moment: float, folder: Path, lr: float) -> str:
    """What a process gets that claims at this moment, and then writes as runs do."""
    time.sleep(max(0.0, moment - time.time()))
    try:
        claim(folder, {"lr": lr})
    except InputError as error:
        return str(error)
    (folder / "metrics.jsonl").touch()
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("runs", [1, 8])
def test_of_runs_that_claim_a_folder_at_once_one_gets_it(tmp_path: Path, runs: int) -> None:
    """Eight processes of ``runs`` different runs: those of one get it, all others the sentence; 100 times."""
    with ProcessPoolExecutor(8, get_context("fork")) as pool:
        list(pool.map(time.sleep, [0.1] * 8))  # all are there
        for number in range(100):
            folder, moment = tmp_path / str(number), time.time() + 0.02
            lrs = [float(process % runs) for process in range(8)]
            said = list(pool.map(claim_at, [moment] * 8, [folder] * 8, lrs))
            (winner,) = {lr for lr, sentence in zip(lrs, said, strict=True) if not sentence}
            assert json.loads((folder / "config.json").read_text()) == {"lr": winner}
            for lr, sentence in zip(lrs, said, strict=True):
                assert sentence == "" if lr == winner else f"(lr is {winner} there and {lr} here)" in sentence


def test_one_process_writes_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its owner is named; whoever comes after it finds the same run; one that has finished is only read."""
    folder = tmp_path / "run"
    with claimed(folder, {"lr": 1}) as finished:
        assert not finished
        for other in (
            lambda: claimed(folder, {"lr": 1}),
            lambda: claimed(folder, {"lr": 2}),
            lambda: own_folder(folder),
        ):
            with pytest.raises(HeldError, match=f"in use by process {os.getpid()} on"):
                other().__enter__()
        (folder / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="lr is 1 there and 2 here"), claimed(folder, {"lr": 2}):
        raise AssertionError
    (folder / "record.json").touch()
    dead = replace(Owner.here(), born="5")  # killed between its record and the removal of its lock
    (folder / "lock.json").write_text(json.dumps(asdict(dead)))
    capfd.readouterr()
    with claimed(folder, {"lr": 1}) as finished:
        assert finished
        assert str(folder) in capfd.readouterr().out  # or results of earlier data would look like those of today's
    folder.chmod(0o555)
    with claimed(folder, {"lr": 1}) as finished:
        assert finished
        assert not (folder / "lock.json").exists()
    folder.chmod(0o755)
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "record.json"}


def test_a_run_that_never_began_leaves_its_folder_to_another(tmp_path: Path) -> None:
    """Killed while it wrote its first file, or ended by an error before its first step."""
    with pytest.raises(ZeroDivisionError), claimed(tmp_path, {"lr": 1}):
        (tmp_path / "tensorboard").mkdir()
        1 / 0  # noqa: B018
    (tmp_path / ".config.1-1.tmp.json").touch()  # as version 0.1 left them
    (tmp_path / "slurm-12.out").touch()
    with claimed(tmp_path, {"lr": 2}) as finished:
        assert not finished
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 2}
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="lr is 2 there"), claimed(tmp_path, {"lr": 1}):
        raise AssertionError


def test_the_folder_of_the_dead_is_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With what it was writing removed, in sub-folders too."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from robust_backbones.runs.files import atomic_path; from robust_backbones.runs.folders import claimed\n"
        "folder = Path(sys.argv[1])\n"
        "with claimed(folder, {}), atomic_path(folder / 'a/weights.pt') as path:\n"
        "    path.touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert len([*tmp_path.glob("a/.weights.*")]) == 1
    with claimed(tmp_path, {}) as finished:
        assert not finished
        assert not [*tmp_path.glob("a/.weights.*")]
    assert "which ended without giving its lock back" in capfd.readouterr().out


def test_a_folder_that_is_removed_is_no_success(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingFailedError, match="was removed while the run wrote it"), claimed(folder, {}):
        shutil.rmtree(folder)
        (folder / "checkpoints").mkdir(parents=True)  # as every writer makes the folders that it needs
    assert not (folder / "record.json").exists()


def test_of_what_is_refused_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(InputError), own_folder(tmp_path / "runs/first"):
        assert (tmp_path / "runs/first/lock.json").exists()
        raise InputError("data that cannot be used")
    assert not [*tmp_path.iterdir()]


def test_a_shared_folder_is_another_runs_only_where_nothing_was_measured_and_nobody_is(tmp_path: Path) -> None:
    dead = replace(Owner.here(), born="5")
    other = tmp_path / ".here~1.lock.json"
    with shared(tmp_path, {"lr": 1}), shared(tmp_path / "other", {"lr": 1}):
        (tmp_path / "cells/clean").mkdir(parents=True)  # of a cell that ended by an error
    other.write_text(json.dumps(asdict(Owner.here())))
    with pytest.raises(InputError, match="lr is 1 there"), shared(tmp_path, {"lr": 2}):
        raise AssertionError
    other.write_text(json.dumps(asdict(dead)))
    with shared(tmp_path, {"lr": 2}):
        assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 2}
        assert not other.exists()
    (tmp_path / "cells/clean/record.json").touch()
    with pytest.raises(InputError, match="lr is 2 there"), shared(tmp_path, {"lr": 1}):
        raise AssertionError
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "config.json", "other"}
