"""Studies: what a manifest becomes, that a run is done once whatever is killed, and who may launch."""

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.errors import InputError
from robust_backbones.runs.cluster import ClusterConfig
from robust_backbones.runs.locks import HeldError, Owner, lock, owner_of
from robust_backbones.sweep import manifest as manifests
from robust_backbones.sweep.launcher import ClusterExecutor, ClusterJob, LocalExecutor, launch, start_process
from robust_backbones.sweep.manifest import expand, read_manifest, settle
from robust_backbones.sweep.plan import Attempt, Plan, Run
from tests.conftest import ROOT, load_tool

Run_ = Callable[..., tuple[int, str, str]]
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


# Manifests


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("sedes", [0], ["'sedes'", "seeds", "backbones"]),
        ("tasks/voc/override", {}, ["task voc", "'override'", "overrides"]),
        ("backbones/robust/epsilon", 3, ["'epsilon'", "published"]),
        ("cluster/gpus", 8, ["'gpus'", "processes"]),
        ("backbones/robust", {"pretrain": "robus"}, ["did you mean robust?"]),
        ("backbones/standard", {"published": "resnet50_l2_eps4"}, ["resnet50_l2_eps3"]),
        ("backbones/standard", {"published": "resnet50_l2_eps0", "file": "x"}, ["exactly one of"]),
        ("backbones/standard", {"file": "nowhere.pt"}, ["nowhere.pt"]),
        ("backbones/again", {"published": "robust://resnet50_l2_eps0"}, ["again", "standard", "same weights"]),
        ("backbones/standard", {"published": "vgg16_bn_l2_eps0"}, ["vgg16_bn"]),
        ("tasks/voc/config_files", ["nowhere.yaml"], ["nowhere.yaml"]),
        ("tasks/voc/overrides", {"SOLVER.MAX_ITERS": 5}, ["SOLVER.MAX_ITER?"]),
        ("tasks/voc/protocols", ["syncbn"], ["syncbn", "not there"]),
        ("tasks/voc/backbones", ["robus"], ["did you mean robust?"]),
        ("tasks/voc", {}, ["config_files", "transfer"]),
        ("tasks/flowers/transfer", "prob", ["did you mean probe?"]),
        ("tasks/flowers/options/epoch", 3, ["task flowers", "epoch"]),
        ("tasks/flowers/overrides", {"SEED": 1}, ["flowers", "no overrides"]),
        ("tasks/voc/robustness", {"corruption": ["fog"]}, ["robustness of task voc", "corruption"]),
        ("tasks/voc/robustness", {"corruptions": ["fogg"]}, ["robustness of task voc", "did you mean fog?"]),
        ("tasks/voc/robustness", {"attacks": ["classes"], "threat_model": "Linf:2/255"}, ["'classes'", "objectness"]),
        ("tasks/flowers/robustness", {"limit": 8}, ["flowers", "eval_threat_model"]),
        ("backbones/standard", {"scratch": "resnet9"}, ["resnet9"]),
        ("backbones/standard", {"scratch": "resnet18", "pretrain": "robust"}, ["exactly one of"]),
        ("tasks", {}, ["no tasks"]),
        ("pretraining/robust/epsilon", 3, ["pretraining robust", "epsilon"]),
        ("pretraining/robust/epochs", "many", ["pretraining robust", "many"]),
        ("pretraining/robust/arch", "resnet9", ["pretraining robust", "resnet9"]),
        ("pretraining/unused", {"data": "images"}, ["unused"]),
        ("seeds", [0, 0], ["differ"]),
        ("seeds", "012", ["list of whole numbers"]),
        ("tasks/a b", {"config_files": [FPN]}, ["'a b'", "folder"]),
        ("cluster/processes", 0, ["processes >= 1"]),
    ],
)
def test_a_wrong_manifest_is_one_sentence(path: str, value: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as info:
        planned(tmp_path, with_(SMALL, path, value))
    message = str(info.value)
    assert message.startswith(str(tmp_path / "study.yaml"))
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1"])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(InputError, match=r"study\.yaml"):
        read_manifest(tmp_path / "study.yaml")
    with pytest.raises(InputError, match="studies/"):
        read_manifest(tmp_path / "other.yaml")


def test_the_graph_of_a_small_study(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    key = keys(plan)
    assert Counter(run.kind for run in plan.runs) == {"pretrain": 1, "convert": 2, "detect": 4, "transfer": 2}
    needs = {run.key: run.needs for run in plan.runs}
    assert needs[key["pretrain-robust"]] == ()
    assert needs[key["convert-robust"]] == (key["pretrain-robust"],)
    assert needs[key["convert-standard"]] == ()
    assert needs[key["voc-robust-seed1"]] == (key["convert-robust"],)
    assert needs[key["flowers-robust"]] == (key["pretrain-robust"],)
    assert needs[key["flowers-standard"]] == ()

    detect = plan.run(key["voc-robust-seed1"]).argv
    words = dict(zip(detect[::2], detect[1::2], strict=False)) | dict(zip(detect[1::2], detect[2::2], strict=False))
    assert words["SEED"] == "1"
    assert words["MODEL.WEIGHTS"] == plan.run(key["convert-robust"]).argv[2]
    assert words["OUTPUT_DIR"] == str(plan.folder(plan.run(key["voc-robust-seed1"])))
    assert words["MODEL.RESNETS.DEPTH"] == "18"  # of the robust backbone; no file says so
    assert "--resume" in detect
    assert "MODEL.RESNETS.DEPTH" not in plan.run(key["voc-standard-seed1"]).argv
    transfer = plan.run(key["flowers-robust"])
    assert transfer.results == tuple(f"{key['pretrain-robust']}/seed_{seed}/record.json" for seed in (0, 1))
    assert "hub:resnet50_l2_eps0" in plan.run(key["flowers-standard"]).argv


def test_the_graph_of_robustness_and_the_floor(tmp_path: Path) -> None:
    """Behind each detector its evaluation; a random backbone has no conversion, and is no transfer's."""
    options = {"corruptions": ["fog"], "severities": [1, 3], "limit": 8}
    content = with_(with_(SMALL, "tasks/voc/robustness", options), "backbones/floor", {"scratch": "resnet18"})
    plan = planned(tmp_path, content)
    key = keys(plan)
    assert Counter(run.kind for run in plan.runs) == {
        "pretrain": 1,
        "convert": 2,
        "detect": 6,
        "evaluate": 6,
        "transfer": 2,
    }
    for name in ("robust", "standard", "floor"):
        run = plan.run(key[f"robustness-voc-{name}-seed1"])
        detector = plan.run(key[f"voc-{name}-seed1"])
        assert run.needs == (detector.key,)
        folder = str(plan.folder(detector))
        assert run.argv[1:4] == ("detector", f"{folder}/config.yaml", f"{folder}/model_final.pth")
        assert run.argv[4:] == (
            *("--output", str(plan.folder(run)), "--corruptions", "fog", "--severities", "1", "3", "--limit", "8"),
        )
    floor = plan.run(key["voc-floor-seed0"])
    assert floor.needs == ()
    assert "MODEL.WEIGHTS" not in floor.argv
    files = [word for flag, word in zip(floor.argv, floor.argv[1:], strict=False) if flag == "--config-file"]
    assert Path(files[-1]).read_text() == (ROOT / "detectron_configs/protocols/scratch.yaml").read_text()
    assert "18" in floor.argv
    # What is done does not depend on how, and another setting is another evaluation of the same detector.
    for change, same in (({"workers": 0, "jobs": 2, "device": "cpu"}, True), ({"attack_steps": 3}, False)):
        changed = keys(planned(tmp_path, with_(content, "tasks/voc/robustness", {**options, **change})))
        assert changed["voc-floor-seed0"] == key["voc-floor-seed0"]
        assert (changed["robustness-voc-floor-seed0"] == key["robustness-voc-floor-seed0"]) is same
    with pytest.raises(InputError, match="flowers is a transfer, and backbone floor has nothing to transfer"):
        planned(tmp_path, with_(content, "tasks/flowers/backbones", ["floor"]))


def test_processes_are_the_tools_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    runs = {run.kind: run for run in plan.runs}
    assert runs["detect"].command(8)[1:3] == ["--num-gpus", "8"]
    assert runs["pretrain"].command(8)[:2] == ["-m", "torch.distributed.run"]
    for kind, processes in (("pretrain", 1), ("convert", 8), ("transfer", 8)):
        assert runs[kind].command(processes) == list(runs[kind].argv)


CHANGES = {
    "seeds": ([0, 2], {"voc-robust-seed1", "voc-standard-seed1", "flowers-robust", "flowers-standard"}),
    "tasks/voc/overrides/SOLVER.MAX_ITER": (9, {f"voc-{b}-seed{s}" for b in ("robust", "standard") for s in (0, 1)}),
    "tasks/flowers/options/epochs": (9, {"flowers-robust", "flowers-standard"}),
    "pretraining/robust/epochs": (
        3,
        {"pretrain-robust", "convert-robust", "voc-robust-seed0", "voc-robust-seed1", "flowers-robust"},
    ),
    "backbones/standard/published": (
        "resnet50_l2_eps3",
        {"convert-standard", "voc-standard-seed0", "voc-standard-seed1", "flowers-standard"},
    ),
}
SAME = {
    "name": "other",
    "cost": "much",
    "cluster/partition": "gpu",
    "tasks/voc/overrides/SOLVER.AMP.ENABLED": "False",
    "tasks/voc/overrides/SOLVER.MAX_ITER": 120,  # what the file says
    "tasks/voc/overrides/TEST.VISUALIZE": 0,
    "tasks/voc/overrides/DATALOADER.NUM_WORKERS": 9,
    "tasks/flowers/options/workers": 0,
    "pretraining/robust/batch_size": 512,  # the default
    "pretraining/robust/device": "cpu",
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_changed_setting_is_another_run(path: str, tmp_path: Path) -> None:
    value, changed = CHANGES[path]
    before, after = keys(planned(tmp_path, SMALL)), keys(planned(tmp_path, with_(SMALL, path, value)))
    assert {name for name, key in before.items() if after.get(name) != key} == changed


@pytest.mark.parametrize("path", SAME)
def test_what_changes_no_result_changes_no_key(path: str, tmp_path: Path) -> None:
    assert keys(planned(tmp_path, with_(SMALL, path, SAME[path]))) == keys(planned(tmp_path, SMALL))


def test_a_later_switch_changes_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = keys(planned(tmp_path, SMALL))
    monkeypatch.setitem(DETECTOR_KEYS, "SOLVER.SWITCH", False)
    monkeypatch.setattr(manifests, "_settings", manifests._settings.__wrapped__)
    assert keys(planned(tmp_path, SMALL)) == before
    assert keys(planned(tmp_path, with_(SMALL, "tasks/voc/overrides/SOLVER.SWITCH", True))) != before


def test_keys_hold_a_files_bytes_not_its_place(torchvision_file: Callable[[str], Path], tmp_path: Path) -> None:
    source = torchvision_file("resnet18").read_bytes()
    content = {"backbones": {"own": {"file": ""}}, "tasks": {"voc": SMALL["tasks"]["voc"]}}
    found = []
    for name, data in (("a.pth", source), ("b.pth", source), ("c.pth", torchvision_file("resnet34").read_bytes())):
        (tmp_path / name).write_bytes(data)
        found.append(keys(planned(tmp_path, with_(content, "backbones/own/file", str(tmp_path / name)))))
    assert found[0] == found[1]
    assert not set(found[0].values()) & set(found[2].values())
    said = with_(content, "backbones/own", {"file": str(tmp_path / "a.pth"), "options": {"threat_model": "L2:3"}})
    plan = planned(tmp_path, said)
    assert plan.runs[0].argv[-2:] == ("--threat-model", "L2:3")
    assert not set(found[0].values()) & set(keys(plan).values())


def test_keys_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    planned(tmp_path, SMALL)
    manifest = read_manifest(tmp_path / "study.yaml")
    assert manifest.output == Path("runs/study")
    assert keys(expand(manifest)) == keys(planned(tmp_path, SMALL))


@given(
    backbones=st.integers(1, 4),
    tasks=st.integers(1, 3),
    protocols=st.integers(0, 2),
    seeds=st.integers(1, 4),
    pretrained=st.integers(0, 3),
    probes=st.integers(0, 2),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_products(
    backbones: int, tasks: int, protocols: int, seeds: int, pretrained: int, probes: int, tmp_path: Path
) -> None:
    pretrained = min(pretrained, backbones)
    names = [f"resnet50_l2_eps{epsilon}" for epsilon in (0, 1, 3, 5)]
    content: dict[str, Any] = {
        "seeds": list(range(seeds)),
        "pretraining": {f"p{i}": {"data": "images", "epochs": i + 1} for i in range(pretrained)},
        "backbones": {
            f"b{i}": {"pretrain": f"p{i}"} if i < pretrained else {"published": names[i]} for i in range(backbones)
        },
        "protocols": {f"c{i}": [SYNCBN] * i for i in range(protocols)},
        "tasks": {
            **{f"t{i}": {"config_files": [FPN], "overrides": {"SOLVER.AMP.ENABLED": False}} for i in range(tasks)},
            **{f"f{i}": {"transfer": "probe", "dataset": "flowers"} for i in range(probes)},
        },
    }
    plan = planned(tmp_path, content)
    found = Counter(run.kind for run in plan.runs)
    assert found["pretrain"] == pretrained
    assert found["convert"] == backbones
    assert found["detect"] == tasks * backbones * max(1, protocols) * seeds
    assert found["transfer"] == probes * backbones
    assert len({run.key for run in plan.runs}) == len(plan.runs)
    position = {run.key: place for place, run in enumerate(plan.runs)}
    assert all(position[need] < position[run.key] for run in plan.runs for need in run.needs)


def test_a_plan_is_a_graph() -> None:
    a, b = Run("a", "stub", "g", ("a.py",)), Run("b", "stub", "g", ("b.py",), needs=("a",))
    for runs, word in (((b, a), "needs a"), ((a, a), "two runs"), ((replace(a, needs=("a",)),), "needs a")):
        with pytest.raises(InputError, match=word):
            Plan("study", "study.yaml", Path("output"), runs)


def test_setup_is_idempotent(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    plan.output.mkdir()
    assert settle(plan)
    before = (plan.output / "plan.json").stat()
    assert not settle(planned(tmp_path, SMALL))
    after = (plan.output / "plan.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert Plan.read(plan.output) == plan
    assert settle(planned(tmp_path, with_(SMALL, "seeds", [0])))


def test_two_manifests_cannot_have_one_folder(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    plan.output.mkdir()
    settle(plan)
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "study.yaml").read_text())
    with pytest.raises(InputError, match=r"another manifest, .*study\.yaml"):
        settle(expand(read_manifest(other, plan.output)))
    (tmp_path / "study.yaml").unlink()  # it was moved
    assert settle(expand(read_manifest(other, plan.output)))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    plan.output.mkdir()
    (plan.output / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds no study"):
        settle(plan)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("voc", {"convert": 13, "detect": 52}),
        ("coco_detection", {"convert": 4, "detect": 16}),
        ("coco_segmentation", {"convert": 4, "detect": 16}),
        ("small", {"pretrain": 2, "convert": 2, "detect": 12}),
        ("robust_backbones", {"pretrain": 5, "convert": 5, "detect": 66, "evaluate": 66, "transfer": 20}),
        ("robust_backbones_cpu", {"pretrain": 5, "convert": 5, "detect": 66, "evaluate": 66, "transfer": 20}),
    ],
)
def test_the_studies_are_ready(name: str, kinds: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    manifest = read_manifest(Path(f"studies/{name}.yaml"))
    plan = expand(manifest)
    assert Counter(run.kind for run in plan.runs) == kinds
    assert manifest.name == name
    assert "GPU" in plan.cost
    if name.startswith("coco"):
        assert {run.work for run in plan.runs if run.kind == "detect"} == {270_000}


# Launching: runs of a script that does nothing, and watches that it is alone and not run again


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
    script = folder / "stub.py"
    script.write_text(STUB)
    output = folder / "output"
    runs = tuple(
        Run(key, "stub", "stub", (str(script), str(folder / "ledger"), str(output / "runs" / key), mode), needs=n)
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(plan.output / "launcher.txt", "ab") as file:
        command = [sys.executable, "-c", LAUNCHER, str(plan.output), str(jobs)]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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
    assert "left no record.json" in plan.last_line(plan.run("d"))
    assert said[-1].startswith("1 of 4 runs are done, 2 failed, 1 are left")
    assert launched(plan)[0] == 1  # tried again, and what is done is left alone
    assert Counter(ledger(plan)) == {"start a": 2, "start c": 1, "start d": 2}


def test_a_preempted_run_goes_on_and_a_finished_one_does_not(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "once", "b": "go"})
    status, said = launched(plan)
    assert status == 0
    assert "cut off, goes on: a" in said
    assert launched(plan)[0] == 0
    # A launcher may have looked before the run was done: the run itself looks again.
    assert start_process(plan, "b", 1, {"PYTHONPATH": str(ROOT)}).wait(60) == 0
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
    by_hand = start_process(plan, "a", 1, {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: "wait a" in ledger(plan))
    second = start_process(plan, "a", 1, {"PYTHONPATH": str(ROOT)})
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
def test_500_runs_and_20_kills(tmp_path: Path) -> None:
    """Children and launchers die at random moments: everything is done in the end, once."""
    chance = random.Random(0)
    modes = {f"run{i:03d}": "moment" for i in range(500)}
    # A few depend on others, so that order is at stake too.
    needs = {f"run{i:03d}": (f"run{i - 7:03d}",) for i in range(20, 500, 5)}
    plan = stubs(tmp_path, modes, needs)
    launcher, kills, launchers = in_process(plan), 0, 0
    while launcher.poll() is None or kills < 20:
        time.sleep(chance.uniform(0.1, 0.8))
        if kills < 20 and launcher.poll() is None:
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
        assert launcher.poll() != 0 or kills == 20, "too few kills while it ran"
    assert launcher.returncode == 0
    assert launchers == 5
    assert set(plan.states().values()) == {"done"}
    assert not {"AGAIN", "TWICE"} & {line.split()[0] for line in ledger(plan)}
    starts = Counter(line.split()[1] for line in ledger(plan))
    assert set(starts) == set(modes)
    assert sum(starts.values()) <= 500 + 15  # each kill of a run costs one more start at most
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
    (plan.folder(runs[3]) / "metrics.jsonl").write_text('{"epoch": 1, "step": 10}\n')
    assert plan.progress(runs[3]) == 0.25
    (plan.folder(runs[3]) / "steps.jsonl").write_text('{"epoch": 2, "step": 15}\n')
    assert plan.progress(runs[3]) == 0.375

    with lock(plan.job(runs[1]) / "lock.json"):
        Attempt(time.time() - 60, 0.1).write(plan.job(runs[1]))  # 30 % in a minute
        left, total = plan.remaining_seconds(plan.states())
        assert left["d1"] == pytest.approx(120, rel=0.05)
        assert total is None  # no pre-training has shown its pace
        (plan.folder(runs[3]) / "record.json").write_text('{"seconds": 9.0}')
        (plan.folder(runs[0]) / "record.json").write_text('{"seconds": 100.0}')
        _, total = plan.remaining_seconds(plan.states())
        assert total == pytest.approx(120 + (100 + 200) / 2, rel=0.05)


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


# Locks


def test_a_lock_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with lock(path) as dead:
        assert dead is None
        owner = owner_of(path)
        assert owner is not None
        assert owner.pid == os.getpid()
        with pytest.raises(HeldError, match=rf"process {os.getpid()} on {socket.gethostname()} since \d+"), lock(path):
            raise AssertionError
        assert path.exists()
    assert not path.exists()
    assert owner_of(path) is None


def other_owner(path: Path, **fields: Any) -> Owner:
    owner = Owner(**{"host": "elsewhere", "pid": 1, "born": "1", "since": "2026-01-01 00:00:00", **fields})
    path.write_text(json.dumps(owner.__dict__))
    return owner


def test_a_dead_process_gives_its_lock_up(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # dead, and not buried
    own = Owner.here()
    for fields in ({"pid": ended.pid, "born": "5"}, {"pid": os.getpid(), "born": "5"}):  # the latter: a pid used again
        dead = other_owner(tmp_path / "lock.json", host=own.host, **fields)
        assert owner_of(tmp_path / "lock.json") is None
        with lock(tmp_path / "lock.json") as found:
            assert found == dead
    ended.wait()


def test_another_machine_is_dead_after_a_long_silence(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    owner = other_owner(path)
    os.utime(path, (time.time() - 300,) * 2)
    assert owner_of(path) == owner
    with pytest.raises(HeldError, match="elsewhere since 2026-01-01 00:00:00, whose last sign of life is 300 s old"):
        lock(path).__enter__()
    os.utime(path, (time.time() - 700,) * 2)
    with lock(path) as dead:
        assert dead == owner


def test_owners_show_that_they_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_backbones.runs.locks._HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "lock.json"
    with lock(path):
        os.utime(path, (0, 0))
        wait_until(lambda: time.time() - path.stat().st_mtime < 5)


def test_who_was_believed_dead_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_backbones.runs.locks._HEARTBEAT_SECONDS", 0.05)
    asked: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number) if pid == os.getpid() else None)
    path = tmp_path / "lock.json"
    with lock(path):
        owner = other_owner(path)
        wait_until(lambda: signal.SIGTERM in asked)
    assert owner_of(path) == owner  # and leaves the other's lock alone


def test_of_many_that_want_a_dead_owners_lock_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from robust_backbones.runs.locks import HeldError, lock\n"
        "while not Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        "try:\n    with lock(Path(sys.argv[1])): print('mine', flush=True); time.sleep(3)\n"
        "except HeldError: print('held', flush=True)\n"
    )
    path, gun = tmp_path / "lock.json", tmp_path / "gun"
    other_owner(path, host=socket.gethostname(), born="5", pid=os.getpid())
    command = [sys.executable, "-c", code, str(path), str(gun)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    many = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(8)]
    time.sleep(1)
    gun.touch()
    said = sorted(process.communicate(timeout=600)[0].strip() for process in many)
    assert said == ["held"] * 7 + ["mine"]


def test_a_strange_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{}")
    with pytest.raises(InputError, match="no lock of ours"), lock(tmp_path / "lock.json"):
        raise AssertionError


# The tool


def test_the_tool_from_setup_to_collect(
    tmp_path: Path, run_tool: Run_, monkeypatch: pytest.MonkeyPatch, torchvision_file: Callable[[str], Path]
) -> None:
    """A real conversion; the detectors are stubs: a study of theirs takes minutes."""
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

    tools = tmp_path / "tools"
    tools.mkdir()
    for path in (ROOT / "tools").glob("*.py"):
        (tools / path.name).symlink_to(path)
    (tools / "train_net.py").unlink()
    (tools / "train_net.py").write_text(
        "import sys, pathlib; folder = pathlib.Path(sys.argv[sys.argv.index('OUTPUT_DIR') + 1])\n"
        "assert pathlib.Path(sys.argv[sys.argv.index('MODEL.WEIGHTS') + 1]).exists()\n"
        "folder.mkdir(parents=True); (folder / 'model_final.pth').touch()\n"
        "(folder / 'record.json').write_text('{\"seconds\": 1.0}')\n"
    )
    monkeypatch.setattr(manifests, "TOOLS", tools)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status, out, err = run_tool("sweep", "launch", *where)
    assert status == 0, out + err
    assert "2 of 2 runs are done" in out
    status, out, _ = run_tool("sweep", "status", *where)
    assert [line.split()[-1] for line in out.splitlines()[:4]] == ["done", "1", "1", "2"]
    assert "time left" not in out
    plan = Plan.read(output)
    status, out, _ = run_tool("sweep", "collect", *where)
    assert out.split() == [str(plan.folder(plan.runs[1]) / "record.json")]
    status, _, err = run_tool("sweep", "collect", *where, "--to", tmp_path / "records")
    assert "1 records copied" in err
    copied = [path.relative_to(tmp_path / "records") for path in (tmp_path / "records").rglob("*") if path.is_file()]
    assert copied == [Path(plan.runs[1].key) / "record.json"]
    assert run_tool("sweep", "launch", *where, "--jobs", 3)[0] == 2


def test_status_names_what_failed(tmp_path: Path, run_tool: Run_) -> None:
    plan = stubs(tmp_path, {"a": "fail", "b": "go"}, {"b": ("a",)})
    launched(plan)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    out = run_tool("sweep", "status", tmp_path / "study.yaml", "--output", plan.output)[1]
    assert f"failed: a: error: this one fails (see {plan.log(plan.run('a'))})" in out
    assert "nobody is launching" in out


def test_runs_side_by_side_have_gpus_of_their_own(tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "go"})
    (tmp_path / "stub.py").write_text(
        "import os, sys; os.makedirs(sys.argv[2]); print(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "open(sys.argv[2] + '/record.json', 'w').write('{}')"
    )
    executor = LocalExecutor(plan, jobs=2, processes=2, gpus=["4", "5", "6", "7", "8"])
    assert launch(plan, executor, say=lambda text: None, pause=0.02) == 0
    assert [plan.last_line(run) for run in plan.runs] == ["4,5", "6,7"]
    with pytest.raises(InputError, match="need 4, and 3 were found"):
        LocalExecutor(plan, jobs=2, processes=2, gpus=["0", "1", "2"])


def test_runs_share_a_gpu_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tool = stubs(tmp_path, {"a": "go"}), load_tool("sweep")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL))
    manifest = read_manifest(tmp_path / "study.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def devices(**options: Any) -> list[str]:
        executor = tool.executor_for(plan, manifest, tool.Launch(tmp_path / "study.yaml", executor="local", **options))
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in executor._environments]

    assert devices() == ["4", "7"]
    assert devices(share=2) == ["4", "7", "4", "7"]
    assert devices(share=2, jobs=3) == ["4", "7", "4"]
    for options in ({"share": 2, "processes": 2}, {"share": 0}, {"share": 2, "jobs": 5}):
        with pytest.raises(InputError, match="give"):
            devices(**options)


# The cluster


def test_runs_as_jobs_of_the_debug_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = stubs(tmp_path, {"a": "once", "b": "go", "c": "fail", "d": "go"}, {"b": ("a",), "d": ("c",)})
    said: list[str] = []
    executor = ClusterExecutor(plan, ClusterConfig("debug", processes=1))
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
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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


def test_conversions_stay_here(slurm: Path, tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "go", "b": "go"}, {"b": ("a",)})
    plan = replace(plan, runs=(replace(plan.runs[0], kind="convert"), plan.runs[1]))
    plan.write()
    assert launch(plan, ClusterExecutor(plan, ClusterConfig("slurm", processes=1)), say=lambda text: None) == 0
    assert ledger(plan) == ["start a", "start b"]
    assert len(list(slurm.glob("*.sh"))) == 1


def test_a_launcher_finds_the_jobs_of_the_one_before(slurm: Path, tmp_path: Path) -> None:
    plan = stubs(tmp_path, {"a": "wait"})
    cluster = ClusterConfig("slurm", processes=1)
    asked: list[bool] = []
    threading.Thread(target=lambda: (wait_until(lambda: "wait a" in ledger(plan)), asked.append(True))).start()
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, cluster), stop=lambda: bool(asked), say=said.append) == 75
    assert plan.states() == {"a": "running"}  # the job is the cluster's, and stays there
    (slurm / "100.state").write_text("RUNNING")
    begun = ClusterExecutor(plan, cluster).begun()
    assert list(begun) == ["a"]
    assert begun["a"].poll() is None
    owner = owner_of(plan.job(plan.run("a")) / "lock.json")
    assert owner is not None
    os.kill(owner.pid, signal.SIGTERM)
    wait_until(lambda: begun["a"].poll() == 75)
    assert len(list(slurm.glob("*.sh"))) == 1


def test_a_lost_job_is_submitted_again(slurm: Path, tmp_path: Path) -> None:
    """One that the scheduler has cancelled before it began."""
    plan = stubs(tmp_path, {"a": "go"})
    text = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(text.replace("subprocess.Popen(", "number > 100 and subprocess.Popen("))
    (slurm / "100.state").write_text("CANCELLED")
    said: list[str] = []
    assert launch(plan, ClusterExecutor(plan, ClusterConfig("slurm", processes=1)), say=said.append) == 0
    assert said.count("started: a") == 2
    assert ledger(plan) == ["start a"]


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


def test_without_slurm_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    plan = stubs(tmp_path, {"a": "go"})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="cannot submit to slurm"):
        launch(plan, ClusterExecutor(plan, ClusterConfig("slurm")), say=lambda text: None)
