"""What a manifest becomes: runs by their settings and weights, each after those that it needs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_backbones.commands import evaluate, train
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.errors import InputError
from robust_backbones.sweep import expand as expansion
from robust_backbones.sweep.expand import expand, missing_data
from robust_backbones.sweep.manifest import read_manifest
from robust_backbones.sweep.plan import Machines, Plan, Run
from robust_backbones.sweep.power import check_power
from tests.sweep.conftest import FPN, SMALL, SYNCBN, keys, planned, with_

PRIMARY = {"task": "voc", "backbone": "robust", "metric": "bbox/AP"}


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
        ("primary", {"task": "voc"}, ["primary needs metric"]),
        ("primary", {"task": "voc", "metric": "bbox/AP"}, ["give it a backbone"]),
        ("primary", {**PRIMARY, "backbone": "robus"}, ["backbone of primary", "did you mean robust?"]),
        ("primary", {**PRIMARY, "backbone": "standard"}, ["with itself"]),
        ("primary", {**PRIMARY, "task": "flowers"}, ["flowers", "transfer"]),
        ("primary", {**PRIMARY, "std": 0.1}, ["both difference and std"]),
        ("primary", {**PRIMARY, "std": -0.1, "difference": 1}, ["std (above 0)"]),
        ("primary", {**PRIMARY, "std": 0.1, "difference": float("nan")}, ["difference of primary", "nan"]),
        ("primary", {**PRIMARY, "std": "0.1", "difference": 1}, ["std of primary"]),
        ("primary", {**PRIMARY, "protocol": "syncbn"}, ["protocol of primary"]),
        ("seeds", [2**32], ["list of whole numbers", "below 4 billion"]),
        ("seeds", "012", ["list of whole numbers"]),
        ("tasks/a b", {"config_files": [FPN]}, ["'a b'", "folder"]),
        ("cluster/processes", 0, ["processes >= 1"]),
        ("tasks/voc/grid", {"SEED": [1, 2]}, ["task voc", "SEED", "the study sets"]),
        ("tasks/voc/robustness", {"output": "elsewhere"}, ["robustness of task voc", "output"]),
        ("tasks/flowers/options/seeds", [7], ["task flowers", "seeds"]),
        (
            "tasks/voc",
            {"config_files": [FPN], "robustness": {"limit": 8}, "overrides": {"DATASETS.TEST": "('a', 'b')"}},
            ["robustness of task voc", "one set"],
        ),
        ("pretraining/robust/cluster.executor", "slurm", ["pretraining robust", "cluster.executor"]),
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
    (tmp_path / "study.yaml").write_text("seeds: [0]\nname: a\nseeds: [1]\n")
    with pytest.raises(InputError, match=r"study\.yaml is no YAML: seeds is there twice, again in line 3"):
        read_manifest(tmp_path / "study.yaml")
    with pytest.raises(InputError, match=r"No such file .* nearest names are figure4\.yaml,"):
        read_manifest("studies/figur4.yaml")


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
    assert words["MODEL.WEIGHTS"] == plan.run(key["convert-robust"]).argv[3]
    assert words["OUTPUT_DIR"] == str(plan.folder(plan.run(key["voc-robust-seed1"])))
    assert words["MODEL.RESNETS.DEPTH"] == "18"  # of the robust backbone; no file says so
    assert "--resume" in detect
    assert "MODEL.RESNETS.DEPTH" not in plan.run(key["voc-standard-seed1"]).argv
    transfer = plan.run(key["flowers-robust"])
    assert transfer.results == tuple(f"robust/seed_{seed}/record.json" for seed in (0, 1))
    assert "hub:resnet50_l2_eps0" in plan.run(key["flowers-standard"]).argv


def test_each_seed_may_have_a_pretraining_of_its_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, with_(SMALL, "pretraining/robust/seed", "each"))
    key = keys(plan)
    assert Counter(run.kind for run in plan.runs) == {"pretrain": 2, "convert": 3, "detect": 4, "transfer": 3}
    sources = set()
    for seed in (0, 1):
        pretraining, transfer = key[f"pretrain-robust-seed{seed}"], plan.run(key[f"flowers-robust-seed{seed}"])
        assert plan.run(pretraining).argv[-2:] == ("--seed", str(seed))
        assert plan.run(pretraining).group == "pretrain-robust"
        (convert,) = plan.run(key[f"voc-robust-seed{seed}"]).needs
        assert plan.run(convert).needs == transfer.needs == (pretraining,)
        assert transfer.results == (f"robust/seed_{seed}/record.json",)
        sources.add(convert)
    assert len(sources) == 2
    assert len({plan.run(key[f"voc-standard-seed{seed}"]).needs for seed in (0, 1)}) == 1
    again = with_(with_(SMALL, "pretraining/robust/seed", "each"), "backbones/again", {"pretrain": "robust"})
    with pytest.raises(InputError, match="are the same weights"):
        planned(tmp_path, again)


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
        assert run.argv[1:5] == ("evaluate", "detector", f"{folder}/config.yaml", f"{folder}/model_final.pth")
        assert run.argv[5:] == (
            *("--output", str(plan.folder(run)), "--corruptions", "fog", "--severities", "1", "3", "--limit", "8"),
        )
    floor = plan.run(key["voc-floor-seed0"])
    assert floor.needs == ()
    assert "MODEL.WEIGHTS" not in floor.argv
    files = [word for flag, word in zip(floor.argv, floor.argv[1:], strict=False) if flag == "--config-file"]
    assert files[-1] == "protocols/scratch.yaml"
    assert "18" in floor.argv
    # What is done does not depend on how, and another setting is another evaluation of the same detector.
    for change, same in (({"workers": 0, "jobs": 2, "device": "cpu"}, True), ({"attack_steps": 3}, False)):
        changed = keys(planned(tmp_path, with_(content, "tasks/voc/robustness", {**options, **change})))
        assert changed["voc-floor-seed0"] == key["voc-floor-seed0"]
        assert (changed["robustness-voc-floor-seed0"] == key["robustness-voc-floor-seed0"]) is same
    with pytest.raises(InputError, match="flowers is a transfer, and backbone floor has nothing to transfer"):
        planned(tmp_path, with_(content, "tasks/flowers/backbones", ["floor"]))


def test_processes_are_the_verbs_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    runs = {run.kind: run for run in plan.runs}
    assert runs["detect"].command(8)[2:4] == ["--num-gpus", "8"]
    assert runs["pretrain"].command(8)[-len(runs["pretrain"].argv) :] == [*runs["pretrain"].argv]
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
    monkeypatch.setattr(expansion, "detector_settings", expansion.detector_settings.__wrapped__)
    assert keys(planned(tmp_path, SMALL)) == before
    assert keys(planned(tmp_path, with_(SMALL, "tasks/voc/overrides/SOLVER.SWITCH", True))) != before


def test_what_is_said_of_a_file_holds_for_its_transfer_too(
    torchvision_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """The verb reads no such options: it is given the converted file, in which they are."""
    own = {"file": str(torchvision_file("resnet18")), "options": {"threat_model": "L2:3"}}
    content = {"backbones": {"own": own}, "tasks": {"flowers": SMALL["tasks"]["flowers"]}}
    convert, transfer = planned(tmp_path, content).runs
    assert convert.argv[-2:] == ("--threat-model", "L2:3")
    assert transfer.needs == (convert.key,)
    assert convert.argv[3] in transfer.argv
    assert transfer.results == ("own/seed_0/record.json",)
    del own["options"]
    (transfer,) = planned(tmp_path, content).runs
    assert own["file"] in transfer.argv


def test_keys_hold_a_files_bytes_not_its_place(torchvision_file: Callable[[str], Path], tmp_path: Path) -> None:
    source = torchvision_file("resnet18").read_bytes()
    other = tmp_path / "other.pth"
    state = torch.load(torchvision_file("resnet18"), weights_only=True)
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, other)
    content = {"backbones": {"own": {"file": ""}}, "tasks": {"voc": SMALL["tasks"]["voc"]}}
    found = []
    for name, data in (("a.pth", source), ("b.pth", source), ("c.pth", other.read_bytes())):
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
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert plan.set_up()
    before = (plan.output / "plan.json").stat()
    assert not planned(tmp_path, SMALL).set_up()
    after = (plan.output / "plan.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert Plan.read(plan.output) == plan
    assert planned(tmp_path, with_(SMALL, "seeds", [0])).set_up()


def test_two_manifests_cannot_have_one_folder(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    plan.output.mkdir()
    plan.set_up()
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "study.yaml").read_text())
    with pytest.raises(InputError, match=r"another manifest, .*study\.yaml"):
        expand(read_manifest(other, plan.output)).set_up()
    (tmp_path / "study.yaml").unlink()  # it was moved
    assert expand(read_manifest(other, plan.output)).set_up()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL)
    plan.output.mkdir()
    (plan.output / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds no study"):
        plan.set_up()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("figure4", {"convert": 13, "detect": 52 + 20 + 32}),
        ("coco_screening", {"convert": 15, "detect": 30}),
        ("coco_lsj", {"convert": 4, "detect": 24}),
        ("small", {"pretrain": 2, "convert": 2, "detect": 12}),
        ("robust_backbones", {"pretrain": 30, "convert": 30, "detect": 60, "evaluate": 60, "transfer": 120}),
    ],
)
def test_the_studies_are_ready(
    name: str, kinds: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # in any folder the package's own files are found
    manifest = read_manifest(f"studies/{name}.yaml")
    plan = expand(manifest)
    assert Counter(run.kind for run in plan.runs) == kinds
    assert manifest.name == name
    assert "GPU" in plan.cost
    assert check_power(manifest)  # a primary comparison has the seeds that it needs
    works = {run.group: run.work for run in plan.runs if run.kind == "detect"}
    if name == "figure4":
        assert works == {"voc": 18_000, "coco_detection": 270_000, "coco_segmentation": 270_000}
    if name == "coco_screening":
        assert (works, plan.pending) == ({"screening": 90_000}, {"final": "screening"})


def test_published_backbones_are_checked_where_imagenet_is(tmp_path: Path) -> None:
    """By the accuracy that is published, after the conversion and before all else; other runs stay what they are."""
    before = planned(tmp_path, SMALL)
    (tmp_path / "imagenet/val").mkdir(parents=True)
    after = planned(tmp_path, {**SMALL, "imagenet": str(tmp_path / "imagenet")})
    check = after.run(keys(after)["check-standard"])
    assert {name: key for name, key in keys(after).items() if name != "check-standard"} == keys(before)
    assert check.argv[check.argv.index("--expected") + 1] == "75.8"
    assert evaluate.parse([*check.argv[2:]]).expected == 75.8  # type: ignore[union-attr]
    assert check.needs == (keys(after)["convert-standard"],)
    for name in ("voc-standard-seed0", "flowers-standard"):
        assert check.key in after.run(keys(after)[name]).needs


def test_a_regression_has_one_trial_whatever_the_seeds(tmp_path: Path) -> None:
    """The verb writes no other, for which the run would count as failed."""
    plan = planned(tmp_path, with_(SMALL, "tasks/flowers/options", {"data_root": "data", "solver": "lbfgs"}))
    results = {run.results for run in plan.runs if run.kind == "transfer"}
    assert results == {(f"{label}/seed_0/record.json",) for label in ("robust", "resnet50_l2_eps0")}


def test_what_transfers_lack_is_told(tmp_path: Path) -> None:
    def lines(dataset: str, options: dict[str, Any]) -> list[str]:
        content = with_(SMALL, "tasks", {"own": {"transfer": "probe", "dataset": dataset, "options": options}})
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
        return missing_data(read_manifest(tmp_path / "study.yaml"))

    (tmp_path / "mine").mkdir()
    assert lines(str(tmp_path / "mine"), {}) == []
    assert lines("nowhere", {}) == ["no folder nowhere, with train/ and test/"]
    for name in ("data_root", "data-root"):
        (line,) = lines("flowers", {name: str(tmp_path)})
        assert "is not in" in line
    with pytest.raises(InputError, match="task own names the data set flowers: give the options data_root"):
        lines("flowers", {})


def test_the_machines_of_a_run_find_each_other(tmp_path: Path) -> None:
    runs = {run.kind: run for run in planned(tmp_path, SMALL).runs}
    machines = Machines(2, 1, "node7:20001")
    verb = runs["detect"].command(4, machines)[2:10]
    assert " ".join(verb) == "--num-gpus 4 --num-machines 2 --machine-rank 1 --dist-url tcp://node7:20001"
    options = train.parse(runs["detect"].command(4, machines)[2:])
    assert (options.num_machines, options.machine_rank, options.dist_url) == (2, 1, "tcp://node7:20001")
    torchrun, *words = runs["pretrain"].command(4, machines)
    assert torchrun == "torch.distributed.run"
    assert words[:6] == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=node7", "--master-port=20001", "--nproc-per-node=4", "-m"),
    ]
