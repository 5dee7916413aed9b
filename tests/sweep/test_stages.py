"""A task that chooses its backbones by the results of an earlier one, on other images and other seeds."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from robust_backbones.analysis.experiments import experiments
from robust_backbones.analysis.records import RecordedRun, find_primary
from robust_backbones.analysis.statistics import compare
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from robust_backbones.sweep import command
from robust_backbones.sweep.expand import expand
from robust_backbones.sweep.manifest import Manifest
from robust_backbones.sweep.plan import Plan
from tests.sweep.conftest import FPN, keys, planned, with_

OVERRIDES = {"SOLVER.AMP.ENABLED": False}
STAGES: dict[str, Any] = {
    "seeds": [0, 1],
    "backbones": {name: {"published": f"resnet50_l2_{name}"} for name in ("eps0", "eps0.5", "eps1", "eps3", "eps5")},
    "tasks": {
        "first": {
            "config_files": [FPN],
            "overrides": {**OVERRIDES, "DATASETS.TEST": ["voc_2007_val"]},
            "seeds": [10, 11],
        },
        "second": {
            "config_files": [FPN],
            "overrides": OVERRIDES,
            "choose": {"task": "first", "metric": "bbox/AP", "best": 2, "keep": ["eps0"]},
        },
    },
    "primary": {"task": "second", "metric": "bbox/AP", "standard": "eps0", "difference": 3, "std": 0.1},
}
GRID = {"SOLVER.BASE_LR": [0.01, 0.02], "SOLVER.WEIGHT_DECAY": [0.0, 1e-4]}


def finish(plan: Plan, values: dict[str, float], seeds: tuple[int, ...] = (10, 11)) -> None:
    """Records of the first task: a value for the name that a run's begins with, and noise a seed."""
    for run in plan.runs:
        for name, value in values.items():
            for seed in seeds:
                if run.key.startswith(f"first-{name}-seed{seed}-"):
                    write(plan.folder(run) / "record.json", value + (-1) ** seed)


def write(path: Path, value: float, **rest: Any) -> RunRecord:
    known = {"threat_model": "L2:0", "seed": 0, "backbone": {}, "config": {}} | rest
    record = RunRecord("run", task="detection", dataset="d", metrics={"bbox/AP": value}, seconds=1.0, **known)
    record.write(path)
    return record


def test_the_best_are_taken_once_all_are_done(tmp_path: Path) -> None:
    plan = planned(tmp_path, STAGES)
    assert plan.pending == {"second": "first"}
    assert not plan.choices
    assert {run.key[:6] for run in plan.runs if run.kind == "detect"} == {"first-"}
    values = {"eps0": 40.0, "eps0.5": 44.0, "eps1": 41.0, "eps3": 43.0, "eps5": 42.0}
    finish(plan, values, seeds=(10,))
    finish(plan, {name: value for name, value in values.items() if name != "eps5"})
    assert planned(tmp_path, STAGES).pending  # one run is left, and it is among the last
    finish(plan, values)
    plan = planned(tmp_path, STAGES)
    assert not plan.pending
    expected = {f"second-{name}-seed{seed}" for name in ("eps0.5", "eps3", "eps0") for seed in (0, 1)}
    assert {name for name in keys(plan) if name.startswith("second")} == expected
    assert [name for name, _ in plan.choices["second"]["chosen"]] == ["eps0.5", "eps3", "eps0"]
    assert {name: mean for name, _, mean in plan.choices["second"]["means"]} == values
    assert Plan.read(written(plan)) == plan

    # What has begun is not chosen again: neither by other results, nor by more of them.
    plan.folder(plan.run(keys(plan)["second-eps3-seed0"])).mkdir(parents=True)
    for content in (STAGES, with_(STAGES, "tasks/first/seeds", [10, 11, 12])):
        finish(plan, {"eps1": 50.0})
        with pytest.raises(InputError, match=r"second-eps3-seed0.* has begun"):
            planned(tmp_path, content).set_up()
    held = json.loads((plan.output / "plan.json").read_text())
    older = {**held, "runs": [{key: value for key, value in run.items() if key != "task"} for run in held["runs"]]}
    (plan.output / "plan.json").write_text(json.dumps(older))  # of before it was noted
    with pytest.raises(InputError, match=r"second-eps3-seed0.* has begun"):
        planned(tmp_path, STAGES).set_up()
    (plan.output / "plan.json").write_text(json.dumps(held))
    finish(plan, values)
    assert not planned(tmp_path, STAGES).set_up()

    (plan.folder(plan.run(keys(plan)["first-eps1-seed10"])) / "record.json").unlink()
    write(plan.folder(plan.run(keys(plan)["first-eps1-seed10"])) / "record.json", float("nan"))
    text = (plan.folder(plan.run(keys(plan)["first-eps1-seed10"])) / "record.json").read_text()
    (plan.folder(plan.run(keys(plan)["first-eps1-seed10"])) / "record.json").write_text(text.replace("NaN", "null"))
    with pytest.raises(InputError, match=r"first-eps1-seed10.* has no bbox/AP, by which second chooses"):
        planned(tmp_path, STAGES)


def test_what_another_task_of_a_longer_name_has_begun_is_no_hindrance(tmp_path: Path) -> None:
    content = with_(STAGES, "tasks/second-last", {"config_files": [FPN], "overrides": OVERRIDES, "seeds": [7]})
    values = {"eps0": 40.0, "eps0.5": 44.0, "eps1": 41.0, "eps3": 43.0, "eps5": 42.0}
    finish(planned(tmp_path, content), values)
    plan = planned(tmp_path, content)
    written(plan)
    plan.folder(plan.run(keys(plan)["second-last-eps3-seed7"])).mkdir(parents=True)
    finish(plan, {"eps1": 50.0})
    changed = planned(tmp_path, content)
    assert changed.choices != plan.choices
    assert changed.set_up()


def written(plan: Plan) -> Path:
    plan.write()
    return plan.output


def test_values_with_a_slash_make_no_folders_in_folders(tmp_path: Path) -> None:
    grid = {"MODEL.PROPOSAL_GENERATOR.NAME": ["RPN"], "DATASETS.PROPOSAL_FILES_TRAIN": ["('a/b.pkl',)", "('a/c.pkl',)"]}
    plan = planned(tmp_path, with_(STAGES, "tasks/first/grid", grid))
    assert any("a_b.pkl" in run.key for run in plan.runs)
    assert {plan.folder(run).parent for run in plan.runs} == {plan.output / "runs"}


def test_each_backbone_takes_its_own_best_values(tmp_path: Path) -> None:
    """And reports compare them, as what was chosen for each is part of what is compared."""
    content = with_(with_(STAGES, "tasks/first/grid", GRID), "tasks/second/choose/best", 0)
    plan = planned(tmp_path, content)
    generator, means = np.random.default_rng(0), dict[str, dict[tuple[float, float], float]]()
    for name in content["backbones"]:
        for lr in GRID["SOLVER.BASE_LR"]:
            for decay in GRID["SOLVER.WEIGHT_DECAY"]:
                found = generator.uniform(30, 50, 2)
                means.setdefault(name, {})[lr, decay] = found.mean()
                for seed, value in zip((10, 11), found, strict=True):
                    title = f"first-{name}-BASE_LR{lr}-WEIGHT_DECAY{decay}-seed{seed}"
                    write(plan.folder(plan.run(keys(plan)[title])) / "record.json", float(value))
    plan = planned(tmp_path, content)
    best = {name: max(cells, key=lambda one: cells[one]) for name, cells in means.items()}
    assert len(set(best.values())) > 1
    order = sorted(best, key=lambda name: -means[name][best[name]])
    assert [name for name, _ in plan.choices["second"]["chosen"]] == [*(o for o in order if o != "eps0"), "eps0"]
    runs = []
    for name, (lr, decay) in best.items():
        argv = plan.run(keys(plan)[f"second-{name}-seed0"]).argv
        given = dict(pairwise(argv))
        assert (float(given["SOLVER.BASE_LR"]), float(given["SOLVER.WEIGHT_DECAY"])) == (lr, decay)
        config = {key: float(given[key]) for key in GRID} | {"SOLVER.CHOSEN": list(GRID), "MODEL.WEIGHTS": name}
        record = write(tmp_path / "x/record.json", 1.0, config=config, threat_model=f"L2:{name[3:]}")
        runs.append(RecordedRun(tmp_path / name, record))
    (together,) = experiments(runs)
    assert len(together.backbones) == 5
    unlike = [
        replace(run, record=replace(run.record, config={**run.record.config, "SOLVER.CHOSEN": []})) for run in runs
    ]
    assert len(experiments(unlike)) == len(set(best.values()))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("tasks/second/seeds", [11, 12], "has seeds [11] of task first"),
        ("tasks/first/overrides", OVERRIDES, "is tested on voc_2007_test, by which it chooses"),
        ("tasks/second/choose/task", "frist", "did you mean first?"),
        ("tasks/first/choose", {"task": "second", "metric": "bbox/AP"}, "stand before it"),
        ("tasks/second/choose/keep", ["eps4"], "keeps, 'eps4'"),
        ("tasks/second/choose/best", -1, "best is a number"),
        ("tasks/second/choose/number", 3, "unknown key 'number'"),
        ("tasks/second/backbones", ["eps1"], "names no backbones"),
        ("tasks/first/grid", {"SOLVER.BASE_LR": 0.1}, "list of numbers or texts"),
        ("tasks/first/grid", {"SOLVER.BASE_LRS": [0.1]}, "did you mean SOLVER.BASE_LR?"),
        ("tasks/first/seeds", [1.5], "whole numbers"),
        ("protocols", {"a": [], "b": []}, "several protocols"),
        ("tasks/second/grid", {"SOLVER.BASE_LR": [0.1]}, "second, has a grid"),
        ("primary/backbone", "eps1", "best of the choice"),
        ("primary/standard", "eps3", "standard of primary"),
    ],
)
def test_a_wrong_choice_is_one_sentence(path: str, value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as info:
        planned(tmp_path, with_(STAGES, path, value))
    assert words in str(info.value)
    assert "\n" not in str(info.value)


VERB = """
import json, pathlib, sys
if sys.argv[1] == "convert":
    pathlib.Path(sys.argv[3]).parent.mkdir(parents=True)
    sys.exit(pathlib.Path(sys.argv[3]).touch())
folder = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
seed = int(sys.argv[sys.argv.index("SEED") + 1])
stage, name = folder.name.split("-")[:2]
folder.mkdir(parents=True)
value = {"eps0": 40, "eps0.5": 42, "eps1": 41, "eps3": 40, "eps5": 39}[name] + (seed * 37 % 10) / 10
if stage == "second" and name == "eps0.5":
    value += seed * 0.25
record = {"run_id": "r", "task": "detection", "backbone": {"arch": "resnet50", "label": name}, "seed": seed,
    "threat_model": "L2:" + name[3:], "dataset": stage, "metrics": {"bbox/AP": value}, "seconds": 1.0,
    "config": {"SEED": seed, "MODEL": {"WEIGHTS": name}}, "git_commit": None, "versions": {}}
(folder / "record.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
def test_one_launch_goes_through_both_and_reports(
    tmp_path: Path, run_tool: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verb.py").write_text(VERB)

    def stubbed(manifest: Manifest) -> Plan:
        plan = expand(manifest)
        return replace(plan, runs=tuple(replace(run, argv=("verb", *run.argv[1:])) for run in plan.runs))

    monkeypatch.setattr(command, "expand", stubbed)
    content = {**STAGES, "report": "Which one", "imagenet": str(tmp_path / "nowhere")}
    content = with_(content, "tasks/first/seeds", [10])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    where = (tmp_path / "study.yaml", "--output", tmp_path / "output")
    status, out, err = run_tool("sweep", "setup", *where)
    assert status == 0, err
    assert "second will choose its backbones once task first is done" in out
    assert "not checked: the ImageNet accuracy" in out
    declared = find_primary([tmp_path / "output"])
    assert declared is not None
    assert declared.runs == ()
    status, out, err = run_tool("sweep", "launch", *where, "--executor", "local", "--jobs", 2)
    assert status == 0, out + err
    assert "task second has, by mean bbox/AP of task first, seeds 10: eps0.5, eps1, eps0" in out
    plan = Plan.read(tmp_path / "output")
    declared = find_primary([tmp_path / "output/report"])
    assert declared is not None
    assert set(declared.runs) == {keys(plan)[f"second-eps0.5-seed{seed}"] for seed in (0, 1)}
    found = {
        name: {
            seed: json.loads(
                (plan.folder(plan.run(keys(plan)[f"second-{name}-seed{seed}"])) / "record.json").read_text()
            )
            for seed in (0, 1)
        }
        for name in ("eps0", "eps0.5")
    }
    values = {name: {s: one["metrics"]["bbox/AP"] for s, one in own.items()} for name, own in found.items()}
    alone = compare(values["eps0"], {"eps0.5": values["eps0.5"]})["eps0.5"]
    assert f"Primary comparison, tested alone. {alone.sentence}" in (tmp_path / "output/report/report.html").read_text()
    assert run_tool("sweep", "status", *where)[1].splitlines()[-1] == "nobody is launching"

    # Neither what another setting has left nor the report before has a part in the next one.
    before = (tmp_path / "output/report/records.jsonl").read_bytes()
    left = found["eps0"][0] | {"metrics": {"bbox/AP": 1.0}}
    (folder := tmp_path / "output/runs/second-eps0-seed0-0123456789").mkdir()
    (folder / "record.json").write_text(json.dumps(left))
    status, out, err = run_tool("sweep", "launch", *where)
    assert status == 0, err
    assert (tmp_path / "output/report/records.jsonl").read_bytes() == before
