"""The power that a study is planned with: an independent simulation, the paper's numbers, a pilot's records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from robust_backbones.analysis.paper.values import PAPER
from robust_backbones.analysis.records import find_primary
from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.sweep.manifest import Manifest, read_manifest
from robust_backbones.sweep.power import Expected, check_power, of_paper, primary_of
from robust_backbones.threat_models import ThreatModel
from tests.conftest import ROOT
from tests.sweep.conftest import SMALL, SYNCBN, keys, planned, with_

MASK = str(ROOT / "detectron_configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
PRIMARY = {"task": "voc", "backbone": "robust", "metric": "bbox/AP"}


def study(folder: Path, content: dict[str, Any]) -> Manifest:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_manifest(path, folder / "output")


def test_power_is_that_of_simulated_studies() -> None:
    """Two backbones with the paper's means and stds; scipy's paired t test on each simulated study."""
    generator, count = np.random.default_rng(0), 20_000
    (paper,) = (one for one in PAPER if (one.task, one.metric) == ("segmentation", "segm/AP"))
    expected = of_paper(paper)
    assert expected is not None
    for seeds in (4, 8):
        runs = {}
        for name, value in (("standard", paper.standard), ("robust", paper.robust)):
            runs[name] = generator.normal(value.mean, value.std or 0, (count, seeds))
        found = (stats.ttest_rel(runs["robust"], runs["standard"], axis=1).pvalue < 0.05).mean()
        assert expected.power(seeds) == pytest.approx(found, abs=4 * np.sqrt(0.25 / count))
    # docs/sweeps.md and the manifests quote these.
    assert [round(expected.power(n), 2) for n in (4, 8)] == [0.41, 0.86]
    assert expected.seeds() == 8
    assert expected.power(7) < 0.8 <= expected.power(8)
    assert Expected(1.0, 1.0, "").power(1) == 0.0


def test_an_underpowered_primary_comparison_is_refused(tmp_path: Path) -> None:
    weak = with_(SMALL, "primary", {**PRIMARY, "difference": 0.5, "std": 0.5})
    with pytest.raises(InputError, match=r"power of 0\.09 .*80% need 10 seeds.*--allow-underpowered") as info:
        check_power(study(tmp_path, weak))
    assert "\n" not in str(info.value)
    assert any("0.09" in line for line in check_power(study(tmp_path, weak), allow_underpowered=True))
    check_power(study(tmp_path, with_(weak, "seeds", [*range(10)])))
    with pytest.raises(InputError):
        check_power(study(tmp_path, with_(weak, "seeds", [*range(9)])))
    # No effect is expected of a metric that the paper does not have, and nothing is declared in old manifests.
    assert "not known" in check_power(study(tmp_path, with_(SMALL, "primary", PRIMARY)))[-1]
    assert "exploratory" in check_power(study(tmp_path, SMALL))[0]


@pytest.mark.parametrize("metric", ["bbox/ap", "segm/AP", "voc_2007_test/bbox/AP", "bbox-11point/AP"])
def test_a_primary_metric_that_no_report_has_is_refused(tmp_path: Path, metric: str) -> None:
    """It was ignored, and the comparison with it."""
    with pytest.raises(InputError, match=rf"no {metric} of task voc: give primary one of bbox/AP, bbox/AP50"):
        check_power(study(tmp_path, with_(SMALL, "primary", {**PRIMARY, "metric": metric})))


def test_exploratory_power_is_at_the_level_of_the_report_s_family(tmp_path: Path) -> None:
    """Which has a test for each table: AP, AP50 and AP75 by both metrics of VOC, of boxes and masks of COCO."""
    coco = {"config_files": [MASK], "overrides": {"SOLVER.AMP.ENABLED": False}}
    for grid, tests in (({}, 13), ({"SOLVER.BASE_LR": [0.01, 0.02]}, 19)):  # 6 + 6, and the accuracy of the transfer
        told = check_power(study(tmp_path, with_(SMALL, "tasks/coco", {**coco, "grid": grid})))
        assert all(f"at 0.05 / {tests} (" in line for line in told[1:3])


def test_a_pilot_plans(tmp_path: Path) -> None:
    differences = (0.2, 0.5, 0.2, 0.7)
    for number, difference in enumerate(differences):
        for trained_at, value in (("L2:0", 40.0 + number), ("L2:0.5", 40.0 + number + difference)):
            backbone = {"arch": "resnet18", "num_classes": 100, "stem": "imagenet"}
            rest = {"config": {"SEED": number}, "versions": {}, "git_commit": None, "seconds": 1.0}
            one = RunRecord(
                run_id=f"{trained_at}{number}",
                task="detection",
                dataset="val",
                threat_model=trained_at,
                seed=number,
                backbone=backbone,
                metrics={"bbox/AP": value},
                **rest,  # type: ignore[arg-type]
            )
            one.write(tmp_path / "pilot" / f"{trained_at[3:]}_{number}" / "record.json")
    declared = with_(SMALL, "primary", {**PRIMARY, "difference": 9.0, "std": 0.1})
    mean, std = np.mean(differences), np.std(differences, ddof=1)
    with pytest.raises(InputError, match=rf"\{mean:+.2f} with a std of {std:.2f} \(a pilot of 4 seeds"):
        check_power(study(tmp_path, declared), pilot=[tmp_path / "pilot"])
    with pytest.raises(InputError, match=r"0 tested comparisons of bbox/AP .*L2:1; tested are L2:0\.5"):
        other = with_(declared, "pretraining/robust/threat_model", "L2:1")
        check_power(study(tmp_path, other), pilot=[tmp_path / "pilot"])
    with pytest.raises(InputError, match="no primary"):
        check_power(study(tmp_path, SMALL), pilot=[tmp_path / "pilot"])


def test_setup_declares_the_comparison_for_the_report(
    tmp_path: Path, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    content = with_(SMALL, "primary", {**PRIMARY, "difference": 0.5, "std": 0.5})
    plan = planned(tmp_path, content)
    where = (tmp_path / "study.yaml", "--output", tmp_path / "output")
    status, out, err = run_tool("sweep", "setup", *where)
    assert (status, err.count("\n")) == (2, 1)
    assert not (tmp_path / "output/plan.json").exists()
    status, out, err = run_tool("sweep", "setup", *where, "--allow-underpowered")
    assert status == 0, err
    assert "power: 0.09 with 2 seeds" in out
    declared = find_primary([tmp_path / "output"])
    assert declared is not None
    assert set(declared.runs) == {keys(plan)[f"voc-robust-seed{seed}"] for seed in (0, 1)}

    # Until a run of it is done it may change; then more seeds may join it, and nothing else.
    other = with_(content, "primary/metric", "bbox/AP50")
    setup = ("sweep", "setup", *where, "--allow-underpowered")
    for changed, status in ((other, 0), (content, 0)):
        planned(tmp_path, changed)
        assert run_tool(*setup)[0] == status
    done = tmp_path / "output/runs" / declared.runs[0]
    done.mkdir(parents=True)
    (done / "record.json").write_text("{}")
    for changed, status in ((other, 2), (SMALL, 2), (with_(content, "seeds", [0, 1, 2]), 0), (content, 2)):
        planned(tmp_path, changed)
        found, _, err = run_tool(*setup)
        assert (found, "declared before" in err) == (status, status == 2)


@pytest.mark.parametrize("named", [{}, {"protocol": "syncbn"}], ids=["not named", "named"])
def test_the_only_protocol_need_not_be_named(tmp_path: Path, named: dict[str, str]) -> None:
    content = with_(with_(SMALL, "protocols", {"syncbn": [SYNCBN]}), "primary", {**PRIMARY, **named})
    plan = planned(tmp_path, content)
    declared = primary_of(study(tmp_path, content), plan)
    assert declared is not None
    assert set(declared.runs) == {keys(plan)[f"voc-syncbn-robust-seed{seed}"] for seed in (0, 1)}


@pytest.mark.parametrize("said", [{}, {"threat-model": "L2:3"}, {"recipe": "resnet18_l2_eps3"}], ids=str)
def test_a_primary_comparison_is_with_the_standard_backbone(tmp_path: Path, said: dict[str, str]) -> None:
    content = with_(SMALL, "primary", {**PRIMARY, "backbone": "standard", "standard": "robust"})
    options = dict(content["pretraining"]["robust"])
    if said:
        del options["threat_model"]
    with pytest.raises(InputError, match="robust, was trained at"):
        check_power(study(tmp_path, with_(content, "pretraining/robust", {**options, **said})))


@pytest.mark.parametrize(("trained", "said"), [(None, {}), ("L2:3", {}), (None, {"threat_model": "L2:3"})], ids=str)
def test_a_file_that_is_not_known_as_standard_is_none_to_compare_with(
    tmp_path: Path, trained: str | None, said: dict[str, str]
) -> None:
    """Reports would not test the primary comparison; a study would run to its end before anybody saw it."""
    threat_model = None if trained is None else ThreatModel.parse(trained)
    spec, file = BackboneSpec("resnet18", num_classes=2), tmp_path / "standard.pt"
    write_checkpoint(file, spec=spec, state_dict=build_backbone(spec).state_dict(), threat_model=threat_model)
    content = with_(SMALL, "backbones/standard", {"file": str(file), "options": said})
    content = with_(content, "primary", {**PRIMARY, "standard": "standard", "difference": 50.0, "std": 0.5})
    with pytest.raises(InputError, match=r"the standard of primary, standard, (was trained at L2:3|is not said)"):
        check_power(study(tmp_path, content))
    if trained != "L2:3":
        known = with_(content, "backbones/standard/options", {"threat_model": "L2:0"})
        assert "primary: bbox/AP" in check_power(study(tmp_path, known))[0]
