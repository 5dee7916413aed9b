"""A run is done once, whatever is killed, here or on a cluster."""

import os
import random
import signal
import stat
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from robust_backbones.errors import InputError
from robust_backbones.runs.cluster import ClusterConfig
from robust_backbones.runs.locks import lock, owner_of
from robust_backbones.sweep.launcher import ClusterExecutor, ClusterJob, launch, start_process
from robust_backbones.sweep.plan import Attempt, Plan, Run
from tests.sweep.conftest import STUB, in_process, launched, ledger, stubs, wait_until


def test_runs_wait_for_those_they_need(tmp_path: Path) -> None:
    needs = {"b": ("a",), "c": ("a",), "d": ("b", "c")}
    plan = stubs(tmp_path, dict.fromkeys("abcd", "moment"), needs)
    assert plan.states() == {"a": "ready", "b": "waiting", "c": "waiting", "d": "waiting"}
    assert launched(plan, jobs=4)[0] == 0
    order = [line.split()[1] for line in ledger(plan)]
    assert order[0] == "a"
    assert order[3] == "d"
    assert set(plan.states().values()) == {"done"}
    assert plan.progress(plan.runs[0]) == 1.0


def test_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "fail", "b": "go", "c": "go", "d": "empty"}, {"b": ("a",)})
    status, said = launched(plan)
    assert status == 1
    assert plan.states() == {"a": "failed", "b": "waiting", "c": "done", "d": "failed"}
    assert "failed: a: error: this one fails" in "\n".join(said)
    assert "wrote no record.json" in plan.last_line(plan.run("d"))
    assert said[-1].startswith("1 of 4 runs done, 2 failed, 1 left")
    assert launched(plan)[0] == 1  # tried again, and what is done is left alone
    assert Counter(ledger(plan)) == {"start a": 2, "start c": 1, "start d": 2}


def test_a_preempted_run_goes_on_and_a_finished_one_does_not(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "once", "b": "go"})
    status, said = launched(plan)
    assert status == 0
    assert "interrupted, to be resumed: a" in said
    assert launched(plan)[0] == 0
    # A launcher may have looked before the run was done: the run itself looks again.
    assert start_process(plan, "b", 1, {}).wait(60) == 0
    assert Counter(ledger(plan)) == {"start a": 2, "start b": 1}


def test_a_run_that_is_always_cut_off_fails_in_the_end(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go"})
    (tmp_path / "stub.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    status, said = launched(plan)
    assert status == 1
    assert said.count("started: a") == 6
    assert plan.states() == {"a": "preempted"}


def test_asked_to_stop_the_launcher_asks_its_runs(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "wait", "b": "wait", "c": "go"})
    launcher = in_process(plan)
    wait_until(lambda: {"wait a", "wait b"} <= set(ledger(plan)))
    assert plan.states() == {"a": "running", "b": "running", "c": "ready"}
    launcher.terminate()
    assert launcher.wait(30) == 75
    assert plan.states() == {"a": "preempted", "b": "preempted", "c": "ready"}
    assert {"stop a", "stop b"} <= set(ledger(plan))
    assert not (plan.output / "lock.json").exists()


def test_a_run_started_by_hand_is_waited_for(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "wait", "b": "go"}, {"b": ("a",)})
    by_hand = start_process(plan, "a", 1, {})
    wait_until(lambda: "wait a" in ledger(plan))
    second = start_process(plan, "a", 1, {})
    assert second.wait(30) == 75  # it is held
    assert f"process {by_hand.pid} on" in plan.last_line(plan.run("a"))
    launcher = in_process(plan)
    time.sleep(1)
    assert ledger(plan) == ["start a", "wait a"]
    (tmp_path / "stub.py").write_text(STUB.replace("time.sleep(60)", ""))
    by_hand.terminate()
    by_hand.wait(30)
    assert launcher.wait(30) == 0
    assert ledger(plan)[-3:] == ["start a", "wait a", "start b"]


@pytest.mark.slow
def test_120_runs_and_12_kills(tmp_path: Path) -> None:
    """Children and launchers die at random moments: everything is done in the end, once."""
    chance = random.Random(0)
    modes = {f"run{i:03d}": "moment" for i in range(120)}
    # A few depend on others, so that order is at stake too.
    needs = {f"run{i:03d}": (f"run{i - 7:03d}",) for i in range(20, 120, 5)}
    plan = stubs(tmp_path, modes, needs)
    launcher, kills, launchers = in_process(plan), 0, 0
    while launcher.poll() is None or kills < 12:
        time.sleep(chance.uniform(0.05, 0.35))
        if kills < 12 and launcher.poll() is None:
            if kills % 4 == 3:
                launcher.kill()
                launcher.wait()
                kills, launchers = kills + 1, launchers + 1
            else:
                at_work = [owner_of(path) for path in plan.output.glob("jobs/*/lock.json")]
                owners = [owner for owner in at_work if owner]
                if owners:
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(owners).pid, signal.SIGKILL)
                        kills += 1
        if launcher.poll() is not None and launcher.returncode != 0:
            assert launcher.returncode == -signal.SIGKILL
            launcher = in_process(plan)
        assert launcher.poll() != 0 or kills == 12, "too few kills while it ran"
    assert launcher.returncode == 0
    assert launchers == 3
    assert set(plan.states().values()) == {"done"}
    assert not {"AGAIN", "TWICE"} & {line.split()[0] for line in ledger(plan)}
    starts = Counter(line.split()[1] for line in ledger(plan))
    assert set(starts) == set(modes)
    assert sum(starts.values()) <= 120 + 9  # each kill of a run costs one more start at most
    first = {key: place for place, key in reversed(list(enumerate(line.split()[1] for line in ledger(plan))))}
    assert all(first[need[0]] < first[key] for key, need in needs.items())
    assert not [path for path in plan.output.glob("**/lock.json") if owner_of(path)]


def test_progress_and_time_left(tmp_path: Path) -> None:
    detect = Run("d0", "detect", "voc", ("x.py",), work=100)
    runs = (detect, replace(detect, key="d1"), replace(detect, key="d2"), Run("p", "pretrain", "p", ("x.py",), work=4))
    plan = Plan("study", "study.yaml", tmp_path, runs)
    for run in runs:
        plan.folder(run).mkdir(parents=True)
    assert [plan.progress(run) for run in runs] == [0, 0, 0, 0]
    (plan.folder(runs[1]) / "metrics.json").write_text('{"iteration": 19}\n{"iteration": 39}\n{"iterat')
    assert plan.progress(runs[1]) == 0.4
    (plan.folder(runs[3]) / "steps.jsonl").write_text('{"epoch": 1, "step": 5}\n')
    assert plan.progress(runs[3]) == 0
    for odd in ('{"step": 0, "epoch": 1}', '{"step": 10}', '{"epoch": "1", "step": [10]}', "[" * 100_000):
        (plan.folder(runs[3]) / "metrics.jsonl").write_text(f"{odd}\n")
        assert plan.progress(runs[3]) == 0
    (plan.folder(runs[3]) / "metrics.jsonl").write_text('{"epoch": 1, "step": 10}\n')
    assert plan.progress(runs[3]) == 0.25
    (plan.folder(runs[3]) / "steps.jsonl").write_text('{"epoch": 2, "step": 15}\n')
    assert plan.progress(runs[3]) == 0.375

    with lock(plan.job(runs[1]) / "lock.json"):
        Attempt(time.time() - 60, 0.1).write(plan.job(runs[1]))  # 30 % in a minute
        assert plan.seconds_left(plan.states())["d1"] == pytest.approx(120, rel=0.05)
        assert plan.time_left(plan.states()) is None  # no pre-training has shown its pace
        (plan.folder(runs[3]) / "record.json").write_text('{"seconds": 9.0}')
        (plan.folder(runs[0]) / "record.json").write_text('{"seconds": 100.0}')
        assert plan.time_left(plan.states()) == pytest.approx(120 + (100 + 200) / 2, rel=0.05)


def test_a_slice_starts_what_ends_in_time(tmp_path: Path) -> None:
    """A stub's record says 2 s. Nobody knows that before the first; then 3 s are enough for each, and 1 s for none."""
    plan = stubs(tmp_path, dict.fromkeys("abcd", "moment"))
    status, said = launched(plan, jobs=4, minutes=1 / 60)
    assert status == 75
    assert ledger(plan) == ["start a"]
    assert said[-1].startswith("1 of 4 runs done, 3 left; 3 would not end in time")
    assert plan.pace(plan.run("a"), "running") == 2.0  # as it was when its state was looked at, a moment before
    assert launched(plan, jobs=4, minutes=0.1)[0] == 0
    assert Counter(ledger(plan)) == dict.fromkeys(["start a", "start b", "start c", "start d"], 1)


def test_a_slice_ends_by_itself(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "wait", "b": "moment"})
    status, said = launched(plan, jobs=2, minutes=0.08)
    assert (status, plan.states()) == (75, {"a": "preempted", "b": "ready"})
    assert "out of time: waiting for the state of 1 run" in said
    attempt = Attempt.read(plan.job(plan.run("a")))
    assert attempt is not None
    assert 0 < attempt.seconds < 5
    # A third of the run in 8 s is a pace of 24 s, also for others of its group.
    replace(attempt, seconds=8.0, reached=1 / 3).write(plan.job(plan.run("a")))
    assert plan.seconds_left(plan.states()) == {"a": pytest.approx(24), "b": pytest.approx(24)}


def test_a_failure_is_named_by_its_error(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go"})
    run = plan.runs[0]
    assert plan.last_line(run) == ""
    plan.job(run).mkdir(parents=True)
    plan.log(run).write_text("---- first\nerror: old\n---- second\n")
    assert plan.last_line(run) == "---- second"
    with open(plan.log(run), "a") as file:
        file.write("10 %\r20 %\r90 %\n\n")
    assert plan.last_line(run) == "90 %"
    with open(plan.log(run), "a") as file:
        file.write("error: new\nTraceback\n=====\n")
    assert plan.last_line(run) == "error: new"


# The cluster


def test_runs_as_jobs_of_the_local_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    plan = stubs(tmp_path, {"a": "once", "b": "go", "c": "fail", "d": "go"}, {"b": ("a",), "d": ("c",)})
    said: list[str] = []
    executor = ClusterExecutor(plan, ClusterConfig("local", processes=1))
    assert launch(plan, executor, say=said.append, pause=0.02) == 1
    assert plan.states() == {"a": "done", "b": "done", "c": "failed", "d": "waiting"}
    assert Counter(ledger(plan)) == {"start a": 2, "start b": 1, "start c": 1}


SBATCH = """#!{python}
# Runs every task of the array at once in a process of its own, as a cluster of one machine would in its time.
import os, pathlib, re, subprocess, sys
text = pathlib.Path(sys.argv[1]).read_text()
folder = pathlib.Path({folder!r})
number = 100 + len(list(folder.glob("*.sh")))
(folder / f"{{number}}.sh").write_text(text)
print(f"Submitted batch job {{number}}")
sys.stdout.flush()
array = re.search(r"--array=0-(\\d+)", text)
for task in range(int(array[1]) + 1) if array else [None]:
    own = {{"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
           "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node"}}
    if task is not None:
        own |= {{"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}}
    subprocess.Popen(["bash", sys.argv[1]], env={{**os.environ, **own}}, stdout=open(folder / "out.txt", "a"),
                     stderr=subprocess.STDOUT, start_new_session=True)
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
"""
SCONTROL = """#!{python}
import os, pathlib, sys
with open(pathlib.Path({folder!r}) / "requeued.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""
SACCT = """#!{python}
import pathlib
print("JobID|State|NodeList")
for path in pathlib.Path({folder!r}).glob("*.state"):
    print(f"{{path.stem}}|{{path.read_text().strip()}}|node")
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub of Slurm on PATH; the folder that gets the scripts it was given."""
    submitit = pytest.importorskip("submitit")
    submitit.SlurmJob.watcher.clear()
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT}.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable, folder=str(folder)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_gets_arrays_of_what_is_ready(slurm: Path, tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "moment", "c": "fail", "d": "go"}, {"d": ("a", "b")})
    cluster = ClusterConfig("slurm", processes=4, partition="gpu", hours=2, restarts=7)
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, cluster, jobs=2), say=said.append, pause=0.1) == 1
    assert plan.states() == {"a": "done", "b": "done", "c": "failed", "d": "done"}
    assert sorted(line.split()[1] for line in ledger(plan)) == ["a", "b", "c", "d"]
    scripts = [path.read_text() for path in sorted(slurm.glob("*.sh"))]
    assert len(scripts) == 2  # a, b and c together, then d
    for line in ("--array=0-2%2", "--gpus-per-node=4", "--partition=gpu", "--time=120", "--ntasks-per-node=1"):
        assert line in scripts[0]
    assert "--array" not in scripts[1]
    assert not list(plan.output.glob("jobs/*/job.json"))


def test_a_run_on_two_machines_is_started_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them knows its own rank and the first one's address; the first holds the lock and writes the log."""
    pytest.importorskip("submitit")
    plan = stubs(tmp_path, {"a": "go"})
    plan = replace(plan, runs=(replace(plan.runs[0], kind="detect", argv=("stub", "train")),))
    plan.write()
    (tmp_path / "stub.py").write_text("import sys; print(sys.argv)")
    job = ClusterJob(plan.output, "a", 4, nodes=2)
    assert job.checkpoint().function == job
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "first,second")
    for rank, log in enumerate(("log.txt", "log_1.txt")):
        monkeypatch.setenv("SLURM_NODEID", str(rank))
        job()
        said = (plan.job(plan.runs[0]) / log).read_text()
        assert f"'--num-machines', '2', '--machine-rank', '{rank}', '--dist-url', 'tcp://first:2" in said
        assert ("wrote no record.json" in said) == (rank == 0)


def test_conversions_stay_here(slurm: Path, tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "go"}, {"b": ("a",)})
    plan = replace(plan, runs=(replace(plan.runs[0], kind="convert"), plan.runs[1]))
    plan.write()
    executor = ClusterExecutor(plan, ClusterConfig("slurm", processes=1))
    assert launch(plan, executor, say=lambda text: None, pause=0.2) == 0
    assert ledger(plan) == ["start a", "start b"]
    assert len(list(slurm.glob("*.sh"))) == 1


def test_a_launcher_finds_the_jobs_of_the_one_before(slurm: Path, tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "wait"})
    cluster = ClusterConfig("slurm", processes=1)
    asked: list[bool] = []
    threading.Thread(target=lambda: (wait_until(lambda: "wait a" in ledger(plan)), asked.append(True))).start()
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, cluster), stop=lambda: bool(asked), say=said.append, pause=0.2) == 75
    assert plan.states() == {"a": "running"}  # the job is the cluster's, and stays there
    (slurm / "100.state").write_text("RUNNING")
    begun = ClusterExecutor(plan, cluster).running()
    assert list(begun) == ["a"]
    assert begun["a"].poll() is None
    owner = owner_of(plan.job(plan.run("a")) / "lock.json")
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    wait_until(lambda: begun["a"].poll() == 75)
    assert len(list(slurm.glob("*.sh"))) == 1


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "\0", "null", "[1]", "{}", '{"job": 7}', '{"job": ""}'])
def test_a_damaged_note_of_a_job_is_named(slurm: Path, tmp_path: Path, content: str) -> None:
    plan = stubs(tmp_path, {"a": "go"})
    note = plan.note(plan.run("a"))
    note.parent.mkdir(parents=True)
    note.write_text(content)
    executor = ClusterExecutor(plan, ClusterConfig("slurm", processes=1))
    with pytest.raises(InputError, match=rf"{note} names no job .*remove it"):
        executor.running()


def test_a_lost_job_is_submitted_again(slurm: Path, tmp_path: Path) -> None:
    """One that the scheduler has cancelled before it began."""
    plan = stubs(tmp_path, {"a": "go"})
    text = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(text.replace("subprocess.Popen(", "number > 100 and subprocess.Popen("))
    (slurm / "100.state").write_text("CANCELLED")
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, ClusterConfig("slurm", processes=1)), say=said.append, pause=0.2) == 0
    assert said.count("started: a") == 2
    assert ledger(plan) == ["start a"]


def test_a_job_that_dies_before_its_first_note_has_failed(slurm: Path, tmp_path: Path) -> None:
    """Its status and last line are its own, not those of the attempt before, which was interrupted."""
    plan = stubs(tmp_path, {"a": "go"})
    job = plan.job(plan.run("a"))
    Attempt(0.0, 0.0, status=75).write(job)
    plan.log(plan.run("a")).write_text("---- before: a\nerror: asked to stop\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n'robust_backbones.sweep.runner' in sys.orig_argv and (os.write(2, b'no disk\\n'), os._exit(1))"
    )
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, ClusterConfig("slurm", processes=1)), say=said.append, pause=0.1) == 1
    assert [line for line in said if "a: no disk" in line]
    assert said.count("started: a") == 1


def test_a_preempted_job_is_put_back_with_its_state_written(slurm: Path, tmp_path: Path) -> None:
    """The signal that submitit has Slurm send before the end of a job's time."""
    plan = stubs(tmp_path, {"a": "wait"})
    executor = ClusterExecutor(plan, ClusterConfig("slurm", processes=1))
    executor.start(plan.runs)
    wait_until(lambda: "wait a" in ledger(plan))
    owner = owner_of(plan.job(plan.run("a")) / "lock.json")
    assert owner is not None
    parent = int(Path(f"/proc/{owner.pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    os.kill(parent, signal.SIGUSR2)
    wait_until(lambda: (slurm / "requeued.txt").exists())
    assert (slurm / "requeued.txt").read_text() == "requeue 100\n"
    assert ledger(plan)[-1] == "stop a"
    assert plan.states() == {"a": "preempted"}


def test_what_is_put_back_is_the_same_job(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    plan = stubs(tmp_path, {"a": "go"})
    job = ClusterJob(plan.output, "a", 2)
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function == job


@pytest.mark.parametrize(("missing", "words"), [("slurm", "cannot submit to slurm"), ("submitit", "pip install")])
def test_without_slurm_one_sentence_says_so_before_a_run_starts(
    missing: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    plan = stubs(tmp_path, {"a": "go", "b": "go"}, {"b": ("a",)})
    plan = replace(plan, runs=(replace(plan.runs[0], kind="convert"), plan.runs[1]))
    plan.write()
    if missing == "slurm":
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=words):
        launch(plan, ClusterExecutor(plan, ClusterConfig("slurm")), say=lambda text: None)
    assert ledger(plan) == []
