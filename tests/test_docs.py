"""The README's commands exist: tools, options, configurations, make targets, pictures."""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from benchmarks.page import excerpt, write_page
from scipy import stats

from robust_backbones.analysis.detection_errors import ORACLES
from robust_backbones.analysis.inheritance_figures import correlation_table, correlations, summary_table
from robust_backbones.analysis.report import write_report
from robust_backbones.analysis.study import Result, Run, display_rows, experiments, find_runs, metric_name, results
from robust_backbones.analysis.tables import classifier_rows, detector_robustness_rows, markdown
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.inheritance.matrix import read_matrices
from tests.conftest import ROOT, load_tool

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


def study_results(runs: Sequence[Run], tasks: Collection[str]) -> list[Result]:
    """What the page shows of these tasks: AP, AP50 and mask AP, or accuracies."""
    shown = r"(.*/)?(bbox/AP|bbox/AP50|segm/AP)|clean_accuracy|robust_accuracy"
    found = [result for one in experiments(runs) if one.task in tasks for result in results(one)]
    return [result for result in found if re.fullmatch(shown, result.metric)]


def study_table(runs: Sequence[Run], tasks: Collection[str]) -> str:
    """A row a result and backbone, with the paired tests."""
    heads, rows = list[str](), []
    for result in study_results(runs, tasks):
        heads, found = display_rows(result)
        kind = [result.experiment.dataset, result.experiment.setting or "-", metric_name(result.metric)]
        rows += [[*kind, *row[1:-1]] for row in found if not row[0].startswith("paper: ")]
    return markdown(["data set", "set up", "measure", *heads[1:-1]], rows)


def study_findings(runs: Sequence[Run]) -> tuple[int, list[str]]:
    """How many comparisons were tested, and what those say that stand after correction, a line each."""
    compared = [
        (result, row)
        for tasks in STUDY_TABLES
        for result in study_results(runs, tasks)
        for row in result.rows
        if row.comparison is not None and row.comparison.p_holm is not None
    ]
    lines = [
        f"- {result.title}, {row.backbone.trained_at}: {row.sentence}"
        for result, row in compared
        if row.comparison is not None and row.comparison.verdict in ("better", "worse")
    ]
    return len(compared), lines


STUDY_TABLES = (("detection", "segmentation"), ("detector_robustness",), ("transfer",))


def test_the_page_on_the_study_says_what_its_records_say(tmp_path: Path) -> None:
    folder, page = ROOT / "docs/study", (ROOT / "docs/study.md").read_text()
    runs, words = find_runs([folder]), " ".join(page.split())
    for tasks in STUDY_TABLES:
        assert study_table(runs, tasks) in page, tasks
    assert markdown(*classifier_rows([run.record for run in runs if run.record.task == "pretrain"])) in page
    tested, findings = study_findings(runs)
    assert f"Of {tested} tests, {len(findings)} " in page
    assert "\n".join(findings) in page
    detection = [run.record for run in runs if run.record.task in STUDY_TABLES[0]]
    for kind, name in (("detection", "VOC"), ("segmentation", "COCO")):
        highest = max(record.metrics["bbox/AP50"] or 0 for record in detection if record.task == kind)
        assert f"{highest:.2f} at most on {name}" in words
    [on_detectors] = [line for line in findings if "Classification transfer" not in line]
    assert ", from scratch: " in on_detectors
    assert not [line for line in findings if "full network" in line]
    for result in study_results(runs, STUDY_TABLES[2]):
        if (result.experiment.dataset, result.experiment.setting) == ("cifar10", "full network"):
            highest_row = max(result.rows, key=lambda row: row.summary.mean if row.summary else 0)
            assert highest_row.backbone.trained_at == "L2:0.14"
    backbones = [run.record for run in runs if run.record.task == "pretrain"]
    backbones.sort(key=lambda record: ThreatModel.parse(str(record.threat_model)).epsilon)
    clean, robust = ([record.metrics[f"{kind}_accuracy"] for record in backbones] for kind in ("clean", "robust"))
    assert (clean, robust) == (sorted(clean, reverse=True), sorted(robust, reverse=True))
    assert f"{100 * robust[0] / clean[0]:.0f} % of the standard network's" in words
    assert f"{100 * robust[-1] / clean[-1]:.0f} % at the largest ε" in words
    write_report(runs, tmp_path, title="t")
    for kind in ("figures/*.csv", "tables/*.md"):
        made = {path.name: path.read_text() for path in tmp_path.glob(kind)}
        assert made == {path.name: path.read_text() for path in folder.glob(kind)}
        assert made
    minutes = {
        tasks: f"{sum(run.record.seconds for run in runs if run.record.task in tasks) / 60:.0f} minutes"
        for tasks in (("pretrain",), *STUDY_TABLES[:2])
    }
    assert "pre-training {}, the detectors {}, their evaluations {}".format(*minutes.values()) in words
    numbers = Counter(run.record.task for run in runs)
    detectors = numbers["detection"] + numbers["segmentation"]
    kinds = f"{numbers['pretrain']} backbones, {detectors} detectors, {numbers['detector_robustness']} evaluations"
    assert kinds in words
    assert all((ROOT / "docs" / name).exists() for name in re.findall(r"\((study/[\w./-]+)\)", page))
    assert all(path.stat().st_size < 2_000_000 for path in folder.rglob("*"))
    assert "not measured" in page


def test_the_page_of_transfer_figures_is_what_its_records_draw(tmp_path: Path) -> None:
    folder = ROOT / "docs/transfer_figures"
    page = (ROOT / "docs/transfer_figures.md").read_text()
    write_report(find_runs([folder]), tmp_path, title="t")
    for kind in ("figures/*.csv", "tables/*.md"):
        made = {path.name: path.read_text() for path in tmp_path.glob(kind)}
        assert made == {path.name: path.read_text() for path in folder.glob(kind)}
        assert made
    pictures = re.findall(r"\((transfer_figures/figures/\w+\.png)\)", page)
    assert len(pictures) == 9
    assert all((ROOT / "docs" / picture).exists() for picture in pictures)
    for name in re.findall(r"`([\w-]+)\.md`:\n\n", page):
        assert (folder / f"tables/{name}.md").read_text() in page, name

    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((folder / f"tables/fixed-feature_transfer_{name}.csv").read_text().splitlines()))

    # What its sentences say of the tables.
    assert all(float(row["difference"]) < 0 for row in rows("of_the_best_architectures"))
    assert {row["best ε"] for row in rows("best_epsilon") if row["whose"] == "ours"} == {"L2:0"}
    slopes = {
        whose: [
            float(row["slope"])
            for row in rows("lines_through_source_accuracy")
            if row["data set"] == "cifar10" and row["whose"].startswith(whose) and row["slope"] != "-"
        ]
        for whose in ("ours", "paper")
    }
    assert min(slopes["ours"]) > 0 > max(slopes["paper"])

    def means(figure: str, *keys: str) -> dict[tuple[str, ...], dict[str, str]]:
        lines = (folder / f"figures/transfer_{figure}.csv").read_text().splitlines()
        return {
            tuple(row[key] for key in keys): row
            for row in csv.DictReader(lines)
            if not row.get("whose", "").startswith("paper")
        }

    width = means("width_linear_probe", "dataset", "trained_at", "arch")
    behind = [
        (dataset, at)
        for dataset, at, arch in width
        if arch == "wide_resnet50_2"
        and float(width[dataset, at, arch]["mean"]) < float(width[dataset, at, "resnet50"]["mean"])
    ]
    assert behind == [("caltech101_mini", "L2:0.5")]
    for mode in ("linear_probe", "full_network"):
        texture = means(f"texture_{mode}", "dataset", "kind")
        for dataset in {dataset for dataset, _ in texture}:
            standard, robust, stylized = (texture[dataset, kind] for kind in ("standard", "robust", "stylized"))
            assert float(stylized["mean"]) < float(standard["mean"])
            if mode == "linear_probe":
                assert float(stylized["mean"]) < float(robust["mean"])
            else:
                assert float(robust["min"]) <= float(stylized["mean"]) <= float(robust["max"])


def test_the_page_on_visualization_says_what_every_image_says() -> None:
    page = (ROOT / "docs/visualization.md").read_text()
    tool = load_tool("visualize")
    for command in ("inversion", "saliency", "activation"):
        folder = ROOT / "docs/visualization" / command
        record = RunRecord.read(folder / "record.json")
        assert "\n".join(tool.table(record.metrics)) in page
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


def test_the_page_on_inheritance_says_what_its_accuracies_say() -> None:
    page = (ROOT / "docs/inheritance.md").read_text()
    folder = ROOT / "docs/inheritance"
    matrices = read_matrices([folder / "records"])
    assert markdown(*summary_table(matrices)) in page
    assert markdown(*correlation_table(correlations(matrices))) in page
    # mRI once more, from the files alone.
    accuracies: dict[str, dict[str, dict[str, float]]] = {}
    for path in (folder / "records").glob("*/*/*/seed_*/record.json"):
        metrics = json.loads(path.read_text())["metrics"]
        label, method, target, seed, _ = path.relative_to(folder / "records").parts
        accuracies.setdefault(f"{label} {method} {seed}", {})[target] = metrics
    for run, rows in accuracies.items():
        label, method, _ = run.split()
        before = json.loads((folder / f"records/{label}/pretrained/record.json").read_text())["metrics"]
        gains = [
            [rows[i][f"accuracy/{j}"] - before[f"accuracy/{j}"] for j in sorted(rows) if j != i] for i in sorted(rows)
        ]
        assert len(gains) == 4
        mean_improvement = fmean(fmean(row) for row in gains)
        (found,) = [
            one.mean_robustness_improvement for one in matrices if f"{one.label} {one.method} seed_{one.seed}" == run
        ]
        assert found == mean_improvement
        if len([key for key in accuracies if key.startswith(f"{label} {method} ")]) == 1:
            assert re.search(rf"^\| {label} \| {method} \| 1 \| \{mean_improvement:+.2f} ", page, flags=re.MULTILINE)
    words = " ".join(page.split())

    def change(label: str, method: str, where: str) -> float:
        """Mean over the sets fine-tuned on, of the change there (``own``) or on pre-training."""
        before = json.loads((folder / f"records/{label}/pretrained/record.json").read_text())["metrics"]
        rows = accuracies[f"{label} {method} seed_0"]
        names = {i: f"accuracy/{i if where == 'own' else 'pretraining'}" for i in rows}
        return fmean(rows[i][name] - before[name] for i, name in names.items())

    for where, text in (
        ("own", "keeps {:.0f} % of fine-tuning's gain on the standard backbone and {:.0f} % on the robust one"),
        ("pretraining", "for {:.0f} and {:.0f} % of its loss"),
    ):
        kept = [
            change(label, "wise_ft", where) / change(label, "fine_tuning", where) for label in ("standard", "robust")
        ]
        assert text.format(*(100 * share for share in kept)) in words
    kinds = ("standard", "robust")
    floors, starts = (
        [RunRecord.read(folder / f"records/{kind}/{cell}/record.json").metrics[f"{name}/pretraining"] for kind in kinds]
        for cell, name in (("distances", "wasserstein"), ("pretrained", "accuracy"))
    )
    assert "is {:.2f} (standard) and {:.2f} (robust) feature units".format(*floors) in words
    assert "{:.1f} against {:.1f} % on the photographs left over".format(*starts) in words
    robust, standard = (
        RunRecord.read(folder / f"detectors/voc-{kind}-seed0/before/record.json").metrics["pgd_accuracy"]
        for kind in ("robust", "standard")
    )
    assert f"the robust backbone is {robust - standard:.1f} points ahead under attack" in words
    minutes = [
        sum(RunRecord.read(path).seconds for path in (folder / f"records/{label}").rglob("record.json")) / 60
        for label in ("standard", "robust")
    ]
    assert "18 cells took {:.0f} minutes of one busy core, the second's {:.0f}".format(*minutes) in " ".join(
        page.split()
    )
    for data in ("voc", "coco"):
        left = [
            np.array(
                [
                    RunRecord.read(folder / f"detectors/{data}-{label}-seed{seed}/after/record.json").metrics[
                        "pgd_accuracy"
                    ]
                    for seed in range(3)
                ]
            )
            for label in ("robust", "standard")
        ]
        difference = left[0] - left[1]
        low, high = stats.t.interval(0.95, 2, loc=difference.mean(), scale=stats.sem(difference))
        assert re.search(
            rf"{re.escape(f'{difference.mean():+.2f}')} \([^)]*{re.escape(f'{low:+.2f} to {high:+.2f}')}\)",
            words,
        )
    for path in sorted((folder / "detectors").glob("*/after/record.json")):
        after = RunRecord.read(path)
        before_training = RunRecord.read(path.parents[1] / "before/record.json")
        cells = [
            f"{one.metrics[f'{name}_accuracy']:.1f}" for name in ("clean", "pgd") for one in (before_training, after)
        ]
        assert f"| {path.parents[1].name} | {' | '.join(cells)} |" in page
    for name in ("standard", "robust"):
        metrics = RunRecord.read(folder / f"corruptions/{name}/record.json").metrics
        cells = [f"{metrics[key]:.1f}" for key in ("accuracy/clean", "mean_accuracy")]
        mce = metrics.get("mCE", 100.0)
        assert f"| {name} | {' | '.join(cells)} | {mce:.1f} |" in page
