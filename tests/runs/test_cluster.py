"""Submitted runs, by submitit's executors for one machine."""

import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from robust_backbones import cpu
from robust_backbones.classification.pretrain import pretrain
from robust_backbones.commands.pretrain import PretrainJob, submit
from robust_backbones.errors import InputError
from robust_backbones.runs.cluster import ClusterConfig, log_folder
from robust_backbones.runs.record import RunRecord
from tests.classification.test_pretrain import CONFIG, HERE, same_checkpoints

submitit = pytest.importorskip("submitit")


def job(shapes: Path, output: Path) -> PretrainJob:
    return PretrainJob(replace(CONFIG, epochs=1), shapes / "shapes_classification", output, HERE)


def test_a_submitted_run_is_the_run(shapes: Path, tmp_path: Path) -> None:
    submitted = submit(job(shapes, tmp_path / "run"), ClusterConfig("debug", processes=1))
    assert submitted.result() == RunRecord.read(tmp_path / "run/record.json").metrics
    assert log_folder(tmp_path / "run").is_dir()


@pytest.mark.slow
def test_local_processes_form_one_run(shapes: Path, tmp_path: Path) -> None:
    submitted = submit(job(shapes, tmp_path / "run"), ClusterConfig("local", processes=2, hours=0.2))
    results = submitted.results()
    record = RunRecord.read(tmp_path / "run/record.json")
    assert results == [record.metrics, record.metrics]
    assert record.config["processes"] == 2


def test_an_interrupted_job_is_submitted_again_as_it_is(shapes: Path, tmp_path: Path) -> None:
    one = job(shapes, tmp_path / "run")
    again = one.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args, again.kwargs) == (one, (), {})


def test_a_machine_without_submitit_is_told_the_extra(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'robust-backbones\[slurm\]'"):
        submit(job(shapes, tmp_path / "run"), ClusterConfig("slurm"))


def test_a_machine_without_slurm_says_so(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="cannot submit to slurm"):
        submit(job(shapes, tmp_path / "run"), ClusterConfig("slurm"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"executor": "pbs"}, {"nodes": 0}, {"processes": 2.5}, {"hours": math.nan}])
def test_what_cannot_be_asked_for_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ClusterConfig(**wrong)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(shapes: Path, tmp_path: Path) -> None:
    """The signal that Slurm sends, to the job's own process: the run that submitit starts again ends the same."""
    data = shapes / "shapes_classification"
    config = replace(CONFIG, arch="shufflenet_v2_x1_0")  # whose checkpoints are small
    with cpu.fast():  # as the job computes
        pretrain(config, data, tmp_path / "unbroken", HERE)
    job = PretrainJob(config, data, tmp_path / "run", replace(HERE, checkpoint_minutes=0))
    submitted = submit(job, ClusterConfig("local", processes=1, hours=0.2))
    while not (tmp_path / "run/checkpoints/step_000000003.pt").exists():
        assert submitted.state != "FINISHED"
        time.sleep(0.05)
    controller = submitted.job_id
    process = int(Path(f"/proc/{controller}/task/{controller}/children").read_text().split()[0])
    os.kill(process, signal.SIGUSR2)
    # submitit's controller starts what was put back in the queue, as Slurm would: in the same job, in a new process.
    assert submitted.result() == RunRecord.read(tmp_path / "unbroken/record.json").metrics
    assert "Requeued job" in submitted.stdout()
    assert "resuming from" in submitted.stdout()
    assert same_checkpoints(tmp_path / "run", tmp_path / "unbroken")
