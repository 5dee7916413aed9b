"""The README's commands exist: tools, options, configurations, make targets, pictures."""

import csv
import json
import re
from collections.abc import Callable

import pytest

from robust_backbones.analysis.detection_errors import ORACLES
from robust_backbones.analysis.study import find_runs
from robust_backbones.analysis.tables import detector_robustness_rows, markdown
from robust_backbones.records import RunRecord
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$? ?(?:python|torchrun .*?) (tools/\w+\.py.*(?:\\\n.*)*)", README, flags=re.MULTILINE)


def test_named_files_exist() -> None:
    named = re.findall(r"\b((?:tools|detectron_configs|docs|studies)/[\w/.-]*\w)", README)
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]
    configurations = re.findall(r"`((?:PascalVOC|COCO|quick)[\w/-]+)`", README)
    assert len(configurations) >= 6
    assert not [name for name in configurations if not (ROOT / f"detectron_configs/{name}.yaml").exists()]


def test_named_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_options_are_known(command: str, run_tool: Callable[..., tuple[int, str, str]]) -> None:
    words = command.replace("\\\n", " ").split()
    tool = words[0].removeprefix("tools/").removesuffix(".py")
    if tool != "install_detectron2":
        subcommand = re.findall(r"^[a-z][a-z-]*$", words[1])
        _, help_text, _ = run_tool(tool, *subcommand, "--help")
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text, f"{tool} has no {option}"


def test_the_page_on_detectors_says_what_its_records_say() -> None:
    page = (ROOT / "docs/detector_robustness.md").read_text()
    folder = ROOT / "docs/detector_robustness"
    records = [run.record for run in find_runs([folder / "records"])]
    assert markdown(*detector_robustness_rows(records)) in page
    larger = [run.record for run in find_runs([folder / "larger"])]
    assert markdown(*detector_robustness_rows(larger)) in page
    trained = {run.folder.name: run.record.metrics for run in find_runs([folder / "from_backbone"])}
    for name, measure in (("voc", "bbox/AP50"), ("coco", "bbox/AP")):
        values = [f"{trained[f'{name}_adversarial-{backbone}'][measure]:.1f}" for backbone in ("standard", "robust")]
        assert re.search(rf"{values[0]} (\(standard\) )?and {values[1]}\b", page), values
    attacks = [run.record.metrics for run in find_runs([folder / "attacks"])]
    assert len(attacks) == 16
    assert {metrics["sanity/images"] for metrics in attacks} == {8}
    for sign in ("random_is_stronger", "larger_is_not_stronger"):
        assert max(metrics[f"sanity/{sign}"] or 0 for metrics in attacks) == 2
    cost = json.loads((folder / "attack_cost.json").read_text())["rows"]
    for row in cost:
        assert f"| {row['what']} | {1000 / row['images_per_second']:.0f} | {1 / row['ratio']:.2f}x |" in page
    for name in ("coco-standard", "coco-standard-adversarial"):
        for row in csv.DictReader((folder / f"errors_{name}.csv").read_text().splitlines()):
            values = [float(row["AP50"]), *(float(row[f"{oracle} dAP50"]) for oracle in ORACLES)]
            assert markdown([row["condition"], *(f"{value:.1f}" for value in values)], []).splitlines()[0] in page
    # More steps: the attacked loss does not fall, AP does not rise.
    found = [RunRecord.read(folder / f"steps/{steps}/record.json").metrics for steps in (1, 2, 5, 10)]
    losses = [found[0]["attack-total/clean_loss"], *(metrics["attack-total/loss"] for metrics in found)]
    boxes, masks = (
        [found[0][f"P/{measure}"], *(metrics[f"attack-total/{measure}"] for metrics in found)]
        for measure in ("bbox/AP", "segm/AP")
    )
    for steps, loss, box, mask in zip((0, 1, 2, 5, 10), losses, boxes, masks, strict=True):
        assert f"| {steps} | {loss:.4f} | {box:.2f} | {mask:.2f} |" in page
    assert [losses, boxes, masks] == [sorted(losses), sorted(boxes, reverse=True), sorted(masks, reverse=True)]
