"""Files appear whole or not at all; records come back as they went."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from robust_backbones.analysis.records import find_runs
from robust_backbones.checkpoint.format import save_tensors
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path, write_json
from robust_backbones.runs.folders import claim, shared
from robust_backbones.runs.record import RunRecord
from tests.conftest import ROOT

RECORD = RunRecord("r", "pretrain", {"arch": "resnet50"}, "L2:3", "d", {"clean_accuracy": 1.5, "x": None}, 0, {}, 2.0)


def test_round_trip(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == RECORD
    assert RECORD.versions["torch"]


def test_what_a_file_does_not_say_of_its_making_is_not_made_up(tmp_path: Path) -> None:
    values = {name: value for name, value in asdict(RECORD).items() if name not in ("git_commit", "versions")}
    write_json(tmp_path / "record.json", values)
    (tmp_path / "records.jsonl").write_text(json.dumps({"folder": "r", **values}) + "\n")
    for record in (RunRecord.read(tmp_path / "record.json"), find_runs([tmp_path / "records.jsonl"])[0].record):
        assert (record.git_commit, record.versions) == (None, {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half a f")
        raise KeyboardInterrupt
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from robust_backbones.runs.files import atomic_path
with ExitStack() as stack:
    path = Path(sys.argv[1])
    for _ in range(int(sys.argv[2])):  # what is proven before it gets its name is written by a name of its own, too
        path = stack.enter_context(atomic_path(path))
    path.write_text("half a f")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    config, step = tmp_path / "run/config.json", tmp_path / "run/checkpoints/step_1.pt"

    def kill_while_writing(path: Path, depth: int = 1) -> None:
        assert subprocess.run([sys.executable, "-c", KILLED, str(path), str(depth)], check=False).returncode == -9
        assert [left.suffix for left in path.parent.glob(".*")] == [path.suffix]

    kill_while_writing(config)
    kill_while_writing(config, depth=2)
    assert not claim(tmp_path / "run", {"epochs": 1})  # writes the same file
    assert list(config.parent.iterdir()) == [config]
    kill_while_writing(step)
    with atomic_path(step.with_name("step_2.pt")) as living:
        living.write_text("whole")
        with shared(tmp_path / "run", {"epochs": 1}):
            assert list(step.parent.iterdir()) == [living]
    assert list(step.parent.iterdir()) == [step.with_name("step_2.pt")]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    content = {"weights": torch.arange(6.0).reshape(2, 3), "epochs": 1}
    for name in ("one.pt", "two.pt"):
        save_tensors(tmp_path / name, content)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_ratios_distances_and_what_is_not_defined_are_no_percentages(tmp_path: Path) -> None:
    metrics = {
        "rPC/bbox/AP": 121.4,
        "mCE": 101.4,
        "wasserstein/fog": 300.0,
        "a - b/distance": -0.1,
        "bbox/AP": math.nan,
    }
    replace(RECORD, metrics={**metrics, "accuracy/fog": 100.0, "segm/APs": 0.0}).write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json").metrics.keys() > metrics.keys()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"run_id": 1'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(InputError, match="no record"):
        RunRecord.read(path)
    path.write_text(content)
    with pytest.raises(InputError, match="not a run record"):
        RunRecord.read(path)


def test_the_commit_is_that_of_the_package_not_of_a_repository_around_it(tmp_path: Path) -> None:
    package = tmp_path / "venv/robust_backbones"
    shutil.copytree(ROOT / "robust_backbones/runs", package / "runs")
    shutil.copy(ROOT / "robust_backbones/errors.py", package)
    (package / "__init__.py").touch()
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "PYTHONPATH": str(package.parent)}

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout.strip()

    code = "from robust_backbones.runs.record import git_commit; print(git_commit())"
    run("git", "init")
    run("git", "commit", "--allow-empty", "-m", "another project")
    assert run("git", "rev-parse", "HEAD")
    assert run(sys.executable, "-c", code) == "None"
    run("git", "add", "venv")
    run("git", "commit", "-m", "ours")
    assert run(sys.executable, "-c", code) == run("git", "rev-parse", "HEAD")
    (package / "errors.py").write_text("class InputError(Exception): pass")
    assert run(sys.executable, "-c", code) == run("git", "rev-parse", "HEAD") + "+"
