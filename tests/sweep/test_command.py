"""The verb ``sweep``, from setup to collect."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from robust_backbones.errors import InputError, plural
from robust_backbones.runs.locks import lock
from robust_backbones.sweep import command
from robust_backbones.sweep.launcher import LocalExecutor, launch
from robust_backbones.sweep.manifest import read_manifest
from robust_backbones.sweep.plan import Plan
from tests.sweep.conftest import SMALL, launched, planned, stubs

Run_ = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("stubbed", [{"convert", "detect"}, pytest.param({"detect"}, marks=pytest.mark.slow)], ids=len)
def test_the_verb_from_setup_to_collect(
    stubbed: set[str],
    tmp_path: Path,
    run_tool: Run_,
    monkeypatch: pytest.MonkeyPatch,
    torchvision_file: Callable[[str], Path],
) -> None:
    """The detectors are stubs, and a conversion too where tests are to be fast."""
    content = {
        "cost": "a minute",
        "backbones": {"own": {"file": str(torchvision_file("resnet18"))}},
        "tasks": {"voc": SMALL["tasks"]["voc"]},
    }
    manifest, output = tmp_path / "study.yaml", tmp_path / "output"
    manifest.write_text(yaml.safe_dump(content))
    where = (manifest, "--output", output)
    assert "setup` first" in run_tool("sweep", "status", *where)[2]
    status, out, _ = run_tool("sweep", "setup", *where)
    assert status == 0
    assert "2 runs (1 convert, 1 detect)" in out
    assert "cost: a minute" in out
    with lock(output / "lock.json"):
        for verb in ("setup", "launch"):
            status, _, err = run_tool("sweep", verb, *where)
            assert (status, err.count("\n")) == (2, 1)
            assert f"process {os.getpid()} on" in err
        assert f"launched by process {os.getpid()}" in run_tool("sweep", "status", *where)[1]

    (tmp_path / "verb.py").write_text(
        "import sys, pathlib\n"
        "if sys.argv[1] == 'convert':\n"
        "    pathlib.Path(sys.argv[3]).parent.mkdir(parents=True); sys.exit(pathlib.Path(sys.argv[3]).touch())\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('OUTPUT_DIR') + 1])\n"
        "assert pathlib.Path(sys.argv[sys.argv.index('MODEL.WEIGHTS') + 1]).exists()\n"
        "folder.mkdir(parents=True); (folder / 'model_final.pth').touch()\n"
        "(folder / 'record.json').write_text('{\"seconds\": 1.0}')\n"
    )
    plan = planned(tmp_path, content)
    runs = [replace(run, argv=("verb", *run.argv[1:])) if run.kind in stubbed else run for run in plan.runs]
    stubbed_plan = replace(plan, runs=tuple(runs))
    monkeypatch.setattr(command, "expand", lambda manifest: replace(stubbed_plan, output=manifest.output))
    status, out, err = run_tool("sweep", "launch", *where)
    assert status == 0, out + err
    assert "2 of 2 runs done" in out
    status, out, _ = run_tool("sweep", "status", *where)
    assert [line.split()[-1] for line in out.splitlines()[:4]] == ["done", "1", "1", "2"]
    assert "time left" not in out
    plan = Plan.read(output)
    status, out, _ = run_tool("sweep", "collect", *where)
    assert out.split() == [str(plan.folder(plan.runs[1]) / "record.json")]
    status, _, err = run_tool("sweep", "collect", *where, "--to", tmp_path / "records")
    assert "1 record copied" in err
    copied = [path.relative_to(tmp_path / "records") for path in (tmp_path / "records").rglob("*") if path.is_file()]
    assert copied == [Path(plan.runs[1].key) / "record.json"]
    assert run_tool("sweep", "launch", *where, "--jobs", 3)[0] == 2
    assert run_tool("sweep", "launch", *where, "--minutes", 0)[0] == 2
    assert run_tool("sweep", "pack", *where, "--to", tmp_path / "bundle")[0] == 0
    elsewhere = (manifest, "--output", tmp_path / "elsewhere")
    _, out, err = run_tool("sweep", "unpack", *elsewhere, "--bundle", tmp_path / "bundle")
    assert out.splitlines()[-1] == (
        f"{plural(len(stubbed), 'run')} further than before; 2 of 2 done in {elsewhere[-1]}"
    ), err
    assert run_tool("sweep", "launch", *elsewhere, "--minutes", 1)[0] == 0


def test_setup_says_which_data_is_missing(
    tmp_path: Path, run_tool: Run_, monkeypatch: pytest.MonkeyPatch, torchvision_file: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    own = {"DATASETS.COCO_FORMAT": [["mine", "a.json", "images"]], "DATASETS.TRAIN": ["mine"], "DATASETS.TEST": []}
    content = {
        "backbones": {"own": {"file": str(torchvision_file("resnet18"))}},
        "tasks": {"own": {"config_files": SMALL["tasks"]["voc"]["config_files"], "overrides": own}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    setup = ("sweep", "setup", tmp_path / "study.yaml", "--output", tmp_path / "output")
    status, out, err = run_tool(*setup)
    assert (status, err.count("\n")) == (0, 1)
    assert f"mine lacks {tmp_path / 'a.json'}" in err
    assert out.splitlines()[-1].startswith(f"nothing is started: `robust-backbones sweep launch {setup[2]} --output")
    assert "first get the data that is missing here (1 warning above)" in out
    (tmp_path / "a.json").touch()
    assert f"mine lacks {tmp_path / 'images'}" in run_tool(*setup)[2]
    (tmp_path / "images").mkdir()
    _, out, err = run_tool(*setup)
    assert ("missing" in out, err) == (False, "")


def test_setup_says_where_published_backbones_are_checked(
    tmp_path: Path, run_tool: Run_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For it is whatever has the name in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("imagenet/val").mkdir(parents=True)
    Path("study.yaml").write_text(yaml.safe_dump({**SMALL, "imagenet": "imagenet"}))
    status, out, err = run_tool("sweep", "setup", "study.yaml", "--output", "output")
    assert status == 0, err
    assert f"accuracy of 1 published backbone is checked on {tmp_path / 'imagenet/val'}" in out


def test_status_names_what_failed(tmp_path: Path, run_tool: Run_) -> None:
    plan = stubs(tmp_path, {"a": "fail", "b": "go"}, {"b": ("a",)})
    launched(plan)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    out = run_tool("sweep", "status", tmp_path / "study.yaml", "--output", plan.output)[1]
    assert f"failed: a: error: this one fails (see {plan.log(plan.run('a'))})" in out
    assert "nobody is launching" in out


DAMAGES = {
    "empty": b"",
    "cut off": b'{"started": 1.0, "prog',
    "NUL": b"\0" * 40,
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "another type": b"[1]",
    "nothing": b"null",
    "missing fields": b"{}",
    "another's fields": b'{"mine": 1}',
    "a folder": None,
}
NOTES = {
    "jobs/a/attempt.json": b'{"started": "now", "progress": 0.0, "status": "75", "seconds": 1e999, "reached": []}',
    "jobs/a/lock.json": b'{"host": "here", "pid": "1", "born": [], "since": 3}',
    "plan.json": b'{"name": "s", "manifest": "m", "runs": [{"key": "a", "kind": "k", "group": 1, "argv": "b"}]}',
    "runs/done/record.json": b'{"seconds": NaN}',
}
"""What a study's folder holds, with values of other types, or of none."""


@pytest.mark.parametrize("damage", [*DAMAGES, "other types"])
@pytest.mark.parametrize("note", NOTES)
def test_a_damaged_note_of_a_study_is_named(note: str, damage: str, tmp_path: Path, run_tool: Run_) -> None:
    """And with it removed, as the sentence says, the study continues."""
    plan = stubs(tmp_path, {"a": "go", "done": "go"})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    path, record = plan.output / note, plan.folder(plan.run("done")) / "record.json"
    for parent in (path.parent, record.parent):
        parent.mkdir(parents=True, exist_ok=True)
    record.write_text('{"seconds": 2.0}')
    content = NOTES[note] if damage == "other types" else DAMAGES[damage]
    if content is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(content)
    where = (tmp_path / "study.yaml", "--output", plan.output)
    for verb in (("status",), ("status", "--watch"), ("pack", "--to", tmp_path / "bundle")):
        if verb[0] == "pack" and note == "runs/done/record.json":
            continue  # it packs what is there
        status, _, err = run_tool("sweep", *verb, *where)
        assert (status, err.count("\n"), str(path) in err) == (2, 1, True), err
    if content is not None:
        assert "remove it" in err
    if note != "plan.json" and content is not None:
        path.unlink()
        assert launched(plan)[0] == 0


def test_a_study_whose_plan_is_removed_is_set_up_again(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "go"})
    assert launched(plan)[0] == 0
    for name in ("primary.json", "lock.json"):
        (plan.output / name).touch()
    for name in ("report", "cluster"):
        (plan.output / name).mkdir()
    (plan.output / "plan.json").unlink()
    assert plan.set_up()
    assert set(Plan.read(plan.output).states().values()) == {"done"}
    (plan.output / "plan.json").unlink()
    (plan.output / "holiday.jpg").touch()
    with pytest.raises(InputError, match="holds no study"):
        plan.set_up()


def test_watching_ends_where_nothing_is_to_come(
    tmp_path: Path, run_tool: Run_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on while somebody launches, or a job of a cluster is queued whose launcher has ended."""
    plan = stubs(tmp_path, {"a": "go", "b": "go"})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        raise KeyboardInterrupt  # as a reader ends it

    monkeypatch.setattr("time.sleep", look)

    def watch() -> str:
        looks.clear()
        status, out, _ = run_tool("sweep", "status", tmp_path / "study.yaml", "--output", plan.output, "--watch")
        assert status == 0
        return "goes on" if looks else out.splitlines()[-1]

    assert watch().startswith("no run is at work, and nobody is launching")
    with lock(plan.output / "lock.json"):
        assert watch() == "goes on"
    with lock(plan.job(plan.run("a")) / "lock.json"):
        assert watch() == "goes on"
    plan.note(plan.run("b")).parent.mkdir(parents=True)
    plan.note(plan.run("b")).touch()
    assert watch() == "goes on"
    for run in plan.runs:
        plan.folder(run).mkdir(parents=True)
        (plan.folder(run) / "record.json").write_text('{"seconds": 1.0}')
    assert watch() == "nobody is launching"  # of the last state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--executor", "slurm", "--share", 2], "--share 2 is for runs side by side"),
        (["--share", 2], "--share 2 is for runs side by side"),
        (["--executor", "local", "--share", 0], "--share 0 is no number of runs"),
        (["--no-gpus"], "--no-gpus is for jobs of a cluster"),
        (["--executor", "local", "--no-gpus"], "--no-gpus is for jobs of a cluster"),
        (["--executor", "slurm", "--minutes", 5], "--minutes 5 is for runs of this machine"),
    ],
    ids=str,
)
def test_what_a_launch_would_ignore_is_refused(
    tmp_path: Path, run_tool: Run_, options: list[object], words: str
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    status, _, err = run_tool("sweep", "launch", tmp_path / "study.yaml", "--output", tmp_path / "output", *options)
    assert (status, words in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "output").exists()


def test_runs_side_by_side_have_gpus_of_their_own(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "go"})
    (tmp_path / "stub.py").write_text(
        "import os, sys; os.makedirs(sys.argv[2]); print(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "open(sys.argv[2] + '/record.json', 'w').write('{}')"
    )
    executor = LocalExecutor(plan, jobs=2, processes=2, gpus=["4", "5", "6", "7", "8"])
    assert launch(plan, executor, say=lambda text: None, pause=0.02) == 0
    assert [plan.last_line(run) for run in plan.runs] == ["4,5", "6,7"]
    with pytest.raises(InputError, match="need 4 GPUs, and 3 were found"):
        LocalExecutor(plan, jobs=2, processes=2, gpus=["0", "1", "2"])


def test_runs_share_a_gpu_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tool = stubs(tmp_path, {"a": "go"}), command
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    manifest = read_manifest(tmp_path / "study.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def devices(**options: Any) -> list[str]:
        executor = tool.executor_for(
            plan, manifest, tool.LaunchOptions(tmp_path / "study.yaml", executor="local", **options)
        )
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in executor._environments]

    assert devices() == ["4", "7"]
    assert devices(share=2) == ["4", "7", "4", "7"]
    assert devices(share=2, jobs=3) == ["4", "7", "4"]
    for options in ({"share": 2, "processes": 2}, {"share": 0}, {"share": 2, "jobs": 5}):
        with pytest.raises(InputError, match="give"):
            devices(**options)
