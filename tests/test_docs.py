"""The README's commands exist, and the pages' tables and figures are what their records give."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from benchmarks.page import excerpt, write_page
from scipy import stats

from robust_backbones.analysis import visualization
from robust_backbones.analysis.detection_errors import ORACLES
from robust_backbones.analysis.experiments import experiments, metric_name
from robust_backbones.analysis.inheritance import correlation_table, correlations, summary_table
from robust_backbones.analysis.record_tables import classifier_table, detector_robustness_table
from robust_backbones.analysis.records import RecordedRun, find_runs
from robust_backbones.analysis.report import write_report
from robust_backbones.analysis.results import results
from robust_backbones.analysis.tables import Table
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.inheritance.matrix import read_matrices
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


def test_the_page_on_detectors_has_the_tables_of_its_records() -> None:
    page = (ROOT / "docs/detector_robustness.md").read_text()
    folder = ROOT / "docs/detector_robustness"
    for name in ("records", "larger"):
        records = [run.record for run in find_runs([folder / name])]
        assert detector_robustness_table(records).to_markdown() in page
    for name in ("coco-standard", "coco-standard-adversarial"):
        for row in csv.DictReader((folder / f"errors_{name}.csv").read_text().splitlines()):
            values = [float(row["AP50"]), *(float(row[f"{oracle} dAP50"]) for oracle in ORACLES)]
            assert f"| {' | '.join([row['condition'], *(f'{value:.1f}' for value in values)])} |" in page
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


def test_the_page_of_benchmarks_is_made_of_its_records(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs/benchmarks", tmp_path / "benchmarks")
    records = tmp_path / "benchmarks"
    write_page(records, tmp_path / "benchmarks.md", bfloat16=records / "bfloat16")
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    assert (records / "growth.csv").read_text() == (ROOT / "docs/benchmarks/growth.csv").read_text()
    assert excerpt(records) in README
    # Nothing was timed whose ways do not compute the same.
    checks = [check for path in records.glob("*.json") for check in json.loads(path.read_text()).get("checks", [])]
    assert checks
    assert all(check["found"] <= check["limit"] for check in checks)


def study_table(runs: Sequence[RecordedRun], tasks: Collection[str]) -> str:
    """A row a result and backbone, with the paired tests: AP, AP50 and mask AP, or accuracies."""
    shown = r"(.*/)?(bbox/AP|bbox/AP50|segm/AP)|clean_accuracy|robust_accuracy"
    heads, rows = list[str](), []
    for experiment in (one for one in experiments(runs) if one.task in tasks):
        for result in (one for one in results(experiment) if re.fullmatch(shown, one.metric)):
            heads = list(result.table.columns)[1:-1]
            kind = [experiment.dataset, experiment.setting or "-", metric_name(result.metric)]
            rows += [[*kind, *row[1:-1]] for row in result.table.cells if not row[0].startswith("paper: ")]
    return Table.of(["data set", "set up", "measure", *heads], rows).to_markdown()


def test_the_page_on_the_study_has_the_tables_of_its_records() -> None:
    page, runs = (ROOT / "docs/study.md").read_text(), find_runs([ROOT / "docs/study"])
    for tasks in (("detection", "segmentation"), ("detector_robustness",), ("transfer",)):
        assert study_table(runs, tasks) in page, tasks
    assert classifier_table([run.record for run in runs if run.record.task == "pretrain"]).to_markdown() in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "transfer_figures"])
def test_reports_of_the_docs_are_made_again_from_their_records(name: str, tmp_path: Path) -> None:
    folder = ROOT / "docs" / name
    write_report(find_runs([folder]), tmp_path, title="t")
    for kind in ("figures/*.csv", "tables/*.md", "tables/*.csv"):
        made = {path.name: path.read_text() for path in tmp_path.glob(kind)}
        assert made == {path.name: path.read_text() for path in folder.glob(kind)}
        assert made


def test_the_page_of_transfer_figures_has_its_tables_and_pictures() -> None:
    page = (ROOT / "docs/transfer_figures.md").read_text()
    pictures = re.findall(r"\((transfer_figures/figures/\w+\.png)\)", page)
    assert pictures
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)
    names = re.findall(r"`([\w-]+)\.md`:\n\n", page)
    assert names
    assert all((ROOT / f"docs/transfer_figures/tables/{name}.md").read_text() in page for name in names)


def test_the_page_on_visualization_says_what_every_image_says() -> None:
    page = (ROOT / "docs/visualization.md").read_text()
    for command in ("inversion", "saliency", "activation"):
        folder = ROOT / "docs/visualization" / command
        record = RunRecord.read(folder / "record.json")
        assert "\n".join(visualization.table(record.metrics)) in page
        rows = list(csv.DictReader((folder / "numbers.csv").read_text().splitlines()))
        measured = {name for name in rows[0] if name not in ("backbone", "image")}
        columns = {
            (backbone, measure): np.array([float(row[measure] or "nan") for row in rows if row["backbone"] == backbone])
            for backbone in record.backbone
            for measure in measured
        }
        for (backbone, measure), values in columns.items():
            assert len(values) == record.config["images"]
            assert record.metrics[f"{backbone}/{measure}"] == pytest.approx(values.mean(), abs=1e-9)
        for key in (key for key in record.metrics if " - " in key and not key.endswith(("_low", "_high"))):
            pair, measure = key.split("/")
            one, other = pair.split(" - ")
            difference = columns[one, measure] - columns[other, measure]
            low, high = stats.t.interval(0.95, len(difference) - 1, loc=difference.mean(), scale=stats.sem(difference))
            found = [record.metrics[f"{key}{end}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx([difference.mean(), low, high], abs=1e-9)


def test_the_page_on_inheritance_has_the_tables_of_its_accuracies() -> None:
    page = (ROOT / "docs/inheritance.md").read_text()
    folder = ROOT / "docs/inheritance"
    matrices = read_matrices([folder / "records"])
    assert summary_table(matrices).to_markdown() in page
    assert correlation_table(correlations(matrices)).to_markdown() in page
    # mRI once more, from the files alone.
    for one in matrices:
        own = folder / f"records/{one.label}"
        before = json.loads((own / "pretrained/record.json").read_text())["metrics"]
        after = {
            path.parts[-3]: json.loads(path.read_text())["metrics"]
            for path in (own / one.method).glob(f"*/seed_{one.seed}/record.json")
        }
        assert len(after) == 4
        gains = [
            fmean(after[i][f"accuracy/{j}"] - before[f"accuracy/{j}"] for j in sorted(after) if j != i)
            for i in sorted(after)
        ]
        assert one.mean_robustness_improvement == fmean(gains)
    for path in sorted((folder / "detectors").glob("*/after/record.json")):
        records = [RunRecord.read(path.parents[1] / f"{when}/record.json") for when in ("before", "after")]
        cells = [f"{record.metrics[f'{name}_accuracy']:.1f}" for name in ("clean", "pgd") for record in records]
        assert f"| {path.parents[1].name} | {' | '.join(cells)} |" in page
    for name in ("standard", "robust"):
        metrics = RunRecord.read(folder / f"corruptions/{name}/record.json").metrics
        cells = [f"{metrics[key]:.1f}" for key in ("accuracy/clean", "mean_accuracy")]
        assert f"| {name} | {' | '.join(cells)} | {metrics.get('mCE', 100.0):.1f} |" in page
