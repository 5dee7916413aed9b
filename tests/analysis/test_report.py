"""The report of a study: every number is a record's, every table parses back, the page needs nothing but itself."""

import base64
import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from robust_backbones.analysis import inheritance, study_figures
from robust_backbones.analysis.experiments import bounds, experiments, metric_name, setting_names
from robust_backbones.analysis.figures import COLORS, LINES, MARKERS, MOST_CURVES, Picture, grouped_bars, legend_above
from robust_backbones.analysis.paper.values import PAPER, differences_to_paper, paper_result
from robust_backbones.analysis.records import Primary, RecordedRun, find_primary, find_runs, write_records
from robust_backbones.analysis.report import STYLE, write_report
from robust_backbones.analysis.results import ALIKE, QUESTIONS, answers, conclude, results
from robust_backbones.analysis.statistics import Comparison
from robust_backbones.analysis.study_figures import class_figure, training_figure
from robust_backbones.commands import report as report_command
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord

Run = Callable[..., tuple[int, str, str]]
BACKBONES = ("L2:0", "L2:3", "Linf:4/255")
# By backbone and seed: better than standard; not distinguishable.
BOX = {"L2:0": (40.0, 40.2, 39.9), "L2:3": (41.0, 41.25, 40.88), "Linf:4/255": (40.3, 39.8, 40.1)}
PAPERS = {
    "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"], "COCO_FORMAT": []},
    "SOLVER": {"MAX_ITER": 270_000, "IMS_PER_BATCH": 16},
    "INPUT": {"MIN_SIZE_TEST": 800},
    "MODEL": {"WEIGHTS": "x.pkl", "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 2}},
}


def record(threat_model: str | None, seed: int, **changes: Any) -> RunRecord:
    """A Mask R-CNN's record on COCO, as the paper trains it."""
    box = BOX.get(threat_model or "", (40.0, 40.0, 40.0))[seed]
    metrics: dict[str, float | None] = {"bbox/AP": box, "bbox/AP50": box * 1.5, "segm/AP": box - 3.7, "bbox/APs": None}
    metrics |= {f"bbox/AP-{name}": box + i + 0.01 * i * seed for i, name in enumerate(("cat", "dog"))}
    values: dict[str, Any] = {
        "run_id": f"{threat_model}_{seed}".replace("/", "_"),
        "task": "segmentation",
        "backbone": {"arch": "resnet50", "num_classes": 1000, "source_sha256": f"sha of {threat_model}"},
        "threat_model": threat_model,
        "dataset": "coco_2017_val",
        "metrics": metrics,
        "seed": seed,
        "config": json.loads(json.dumps({**PAPERS, "SEED": seed, "OUTPUT_DIR": str(seed)})),
        "seconds": 60.0,
        "git_commit": "0123456789abcdef",
        "versions": {"torch": "2.15.0"},
    }
    return RunRecord(**(values | changes))


def write(folder: Path, *records: RunRecord) -> Path:
    for number, one in enumerate(records):
        path = folder / f"{one.task}_{one.dataset}_{number}"
        one.write(path / "record.json")
        rows = [{"iteration": i, "total_loss": 2.0 - i / 100 + one.seed / 10} for i in (19, 39, 59)]
        # The last line was cut off by a kill.
        (path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 7')
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 backbones x 3 seeds of a Mask R-CNN, and records of every other task."""
    others = [
        record("L2:0", seed, task="transfer", dataset="pets", metrics={"clean_accuracy": 80.0 + seed})
        for seed in (0, 1)
    ]
    for one in others:
        one.backbone["label"] = "plain"
        one.config.update(
            mode="full_network", metric="top1", normalize=True, num_outputs=0, images_per_class=0, epochs=150
        )
        one.config["selection"] = {"selected": "lr0.01", "on": "held_out", "scores": {"lr0.01": [70.0 + one.seed]}}
    attacked = record(
        "L2:3", 0, task="robustness", dataset="val", metrics={"clean_accuracy": 60.0, "pgd_accuracy": 31.0}
    )
    attacked.config.update(threat_model="L2:3", attack={"steps": 20})
    classifier = record("L2:3", 0, task="pretrain", dataset="imagenet", metrics={"clean_accuracy": 61.5})
    runs = [record(threat_model, seed) for threat_model in BACKBONES for seed in range(3)]
    return write(tmp_path_factory.mktemp("study"), *runs, *others, attacked, classifier)


@pytest.fixture(scope="module")
def report(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    write_report(find_runs([study]), output, title="A <study> & its report")
    return output


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "tables" / f"{name}.csv").read_text())))


def test_csv_holds_the_records_numbers_exactly(report: Path) -> None:
    rows = table(report, "segmentation_coco_2017_val_bbox_AP")
    ours = {row["trained_at"]: row for row in rows if row["origin"] == "ours"}
    assert list(ours) == list(BACKBONES)  # the standard backbone first
    for trained_at, row in ours.items():
        assert [float(value) for value in row["values"].split()] == list(BOX[trained_at])
        assert float(row["mean"]) == fmean(BOX[trained_at])
        assert (row["n"], row["seeds"]) == ("3", "0 1 2")
    assert ours["L2:0"]["difference"] == ""
    differences = [b - a for a, b in zip(BOX["L2:0"], BOX["L2:3"], strict=True)]
    assert float(ours["L2:3"]["difference"]) == fmean(differences)
    assert (ours["L2:3"]["verdict"], ours["Linf:4/255"]["verdict"]) == ("better", "not distinguishable")
    papers = [(row["trained_at"], row["mean"], row["std"], row["n"]) for row in rows if row["origin"] == "paper"]
    assert papers == [("L2:0", "40.67", "0.06", "4"), ("best robust", "40.91", "0.15", "4")]


def test_markdown_and_latex_hold_the_same_cells(study: Path, report: Path) -> None:
    (experiment,) = [e for e in experiments(find_runs([study])) if e.task == "segmentation"]
    for result in results(experiment):
        heads, rows = list(result.table.columns), result.table.cells
        lines = (report / "tables" / f"{result.slug}.md").read_text().split("\n\n")[1].splitlines()
        assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]] == [
            heads,
            *rows,
        ]
        latex = (report / "tables" / f"{result.slug}.tex").read_text()
        body = latex.split(r"\hline")[1:-1]
        cells = [line.split(" & ") for part in body for line in part.strip().removesuffix(r"\\").split(" \\\\\n")]
        assert [[plain(cell).strip() for cell in line] for line in cells] == [heads, *rows]
        assert latex.count(r"\begin{") == latex.count(r"\end{") == 2


def plain(latex: str) -> str:
    """What LaTeX would print of our escapes."""
    latex = latex.replace(r"$\pm$", "±").replace(r"$\dagger$", "†").replace("$<$", "<").replace("$>$", ">")
    assert not re.search(r"(?<!\\)[&%$#_{}~^]", latex), latex
    return re.sub(r"\\([&%$#_{}])", r"\1", latex)


def test_differences_are_rounded_in_tables_alone(report: Path) -> None:
    text = (report / "tables/segmentation_coco_2017_val_bbox_AP.md").read_text()
    assert "| resnet50 | L2:0 | 3 | 40.03 ± 0.15 |" in text
    assert re.search(r"\| \+1\.01 \(\+0\.92 to \+1\.10\) \| 0\.00\d \|", text)  # differences 1, 1.05, 0.98
    assert re.search(r"Better than standard by 1\.01 over 3 paired seeds, p = 0\.00\d\.", text)
    assert "same data, architecture and schedule (3x, inferred from its values)" in text


class Page(HTMLParser):
    """What a page refers to, says and opens; wrong nesting raises."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text())


def test_the_page_loads_nothing(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or (tag == "img" and value.startswith("data:image/")), value
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_pictures_are_whole_and_described(page: Page, report: Path) -> None:
    images = page.all("img")
    assert len(images) >= 4  # two metrics against epsilon, classes, losses
    for image in images:
        kind, data = str(image["src"]).split(";base64,")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
        assert re.search(r"\d", str(image["alt"]))  # says what is to be seen, not only what it is
    assert len({image["alt"] for image in images}) == len(images)
    assert len(page.all("figcaption")) == len(images)
    stems = [path.with_suffix("") for path in (report / "figures").glob("*.svg")]
    assert len(stems) == len(images)
    for stem in stems:
        assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert len(stem.with_suffix(".csv").read_text().splitlines()) > 2


def test_the_page_is_accessible(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta")[1]["content"])
    landmarks = [tag for tag, _ in page.tags if tag in ("header", "nav", "main", "footer")]
    assert landmarks == ["header", "nav", "main", "footer"]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(str(link["href"])[1:] in ids for link in page.all("a"))
    first = next(attributes for tag, attributes in page.tags if tag == "a")
    assert (first["class"], first["href"]) == ("skip", "#main")
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") == "col" for head in page.all("th"))
    regions = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)
    assert ":focus-visible" in STYLE
    assert "@media print" in STYLE


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_suffices() -> None:
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE)
    page_color = "#ffffff"
    pairs = []
    for selector, body in rules:
        color = re.search(r"(?<![-\w])color: (#\w{6})", body)
        background = re.search(r"background: (#\w{6})", body)
        if color:
            pairs.append((selector.strip(), color[1], background[1] if background else page_color))
        elif background:
            pairs.append((selector.strip(), "#0b4f8a", background[1]))  # the skip link
    assert len(pairs) >= 6
    for selector, color, background in pairs:
        light, dark = sorted((luminance(color), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
    assert (luminance("#ffffff") + 0.05) / (luminance("#000000") + 0.05) == pytest.approx(21)


def test_the_page_says_what_the_records_say(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "A <study> & its report" in text
    assert "13 records of runs: 1 of pretrain, 1 of robustness, 9 of segmentation, 2 of transfer" in text
    # Boxes and masks differ by a constant, and so do their comparisons.
    assert "Better in 2 of 4. Robust minus standard, in points: box AP +0.03 to +1.01 (1 better, 1 not" in text
    assert "box AP, against standard: better: resnet50 L2:3 (+1.01, +0.92 to +1.10)" in text
    assert all(text.count(QUESTIONS[task]) == 1 for task in ("segmentation", "transfer"))
    for cell in ("40.03 ± 0.15", "full_network", "61.5", "31.0", "L2:3, PGD-20", "0123456789"):
        assert cell in text
    assert "paper: best robust" in text


def test_numbers_of_figures_are_the_records(report: Path) -> None:
    epsilons = list(csv.DictReader((report / "figures/segmentation_coco_2017_val_bbox_AP_epsilon.csv").open()))
    assert [(row["norm"], float(row["epsilon"])) for row in epsilons] == [
        ("L2", 0),
        ("L2", 3),
        ("Linf", 0),
        ("Linf", pytest.approx(4 / 255)),
    ]
    assert [float(row["mean"]) for row in epsilons] == [fmean(BOX[b]) for b in ("L2:0", "L2:3", "L2:0", "Linf:4/255")]
    # Figure 4 has boxes and masks.
    both = list(csv.DictReader((report / "figures/figure_4.csv").open()))
    assert [row["metric"] for row in both] == ["bbox/AP"] * 4 + ["segm/AP"] * 4
    assert [{key: row[key] for key in epsilons[0]} for row in both[:4]] == epsilons
    classes = list(csv.DictReader((report / "figures/segmentation_coco_2017_val_bbox_AP_classes.csv").open()))
    assert {(row["trained_at"], row["class"]) for row in classes} == {
        (backbone, name) for backbone in BACKBONES[1:] for name in ("cat", "dog")
    }
    expected = [b - a for a, b in zip(BOX["L2:0"], BOX["L2:3"], strict=True)]
    assert float(classes[0]["difference"]) == pytest.approx(fmean(expected))
    losses = list(csv.DictReader((report / "figures/segmentation_coco_2017_val_loss.csv").open()))
    assert [row["iteration"] for row in losses[:3]] == ["19", "39", "59"]
    numbers = [float(losses[0][name]) for name in ("mean", "min", "max")]
    assert numbers == pytest.approx([1.91, 1.81, 2.01])


def one_result(folder: Path, *records: RunRecord, metric: str = "bbox/AP") -> Any:
    (experiment,) = experiments(find_runs([write(folder, *records)]))
    return next(result for result in results(experiment) if result.metric == metric)


def test_holm_is_over_the_whole_report_and_the_primary_comparison_is_tested_alone(study: Path, tmp_path: Path) -> None:
    """The family's p values are those of Holm's procedure over all tables, recomputed here from the raw values."""
    reported = experiments(find_runs([study]))
    declared = Primary("bbox/AP", tuple(run.folder.name for run in reported[0].robust[0].runs.values()))
    for primary in (None, declared):
        found = results(*reported, primary=primary)
        assert {result.experiment.task for result in found} == {one.task for one in reported}
        tests = []
        for result in found:
            for row in result.rows:
                if row.comparison and row.comparison.p is not None:
                    own = row.backbone.values(result.metric)
                    standard = result.experiment.reference(row.backbone).values(result.metric)  # type: ignore[union-attr]
                    p = 1.0 if own == standard else stats.ttest_1samp([own[s] - standard[s] for s in own], 0).pvalue
                    assert row.comparison.p == pytest.approx(p)
                    tests.append((p, row))
        alone = [row for _, row in tests if row.is_primary]
        assert len(alone) == (primary is not None)
        for row in alone:
            assert row.comparison is not None
            assert row.comparison.p_holm == row.comparison.p
            assert "Primary" in row.sentence
        family = sorted(((p, row) for p, row in tests if not row.is_primary), key=lambda test: test[0])
        assert len(family) > 4
        largest = 0.0
        for rank, (p, row) in enumerate(family):
            largest = max(largest, min(1.0, p * (len(family) - rank)))
            assert row.comparison is not None
            assert row.comparison.p_holm == pytest.approx(largest)
    write_report(find_runs([study]), tmp_path / "report", title="t", primary=declared)
    assert find_primary([tmp_path / "report"]) == declared  # a report is made again from its own folder
    assert "Primary comparison" in (tmp_path / "report/report.html").read_text()


def test_missing_metrics_are_dashes_and_said(tmp_path: Path) -> None:
    runs = [record(threat_model, seed) for threat_model in BACKBONES[:2] for seed in range(3)]
    del runs[3].metrics["bbox/AP"]
    runs[4].metrics["bbox/AP"] = float("nan")
    result = one_result(tmp_path, *runs)
    assert [len(row.backbone.values("bbox/AP")) for row in result.rows] == [3, 1]
    assert "resnet50 trained at L2:3 has no box AP for seeds 0, 1: these count nowhere." in result.notes
    assert "one seed that both have (2)" in result.rows[1].sentence
    runs[5].metrics["bbox/AP"] = None
    result = one_result(tmp_path, *runs)
    assert result.table.cells[1][2:-1] == ["0", "-", "-", "-", "-", "-"]
    assert "no result of this backbone" in result.rows[1].sentence
    page = Page(write_report(find_runs([tmp_path]), tmp_path / "report", title="t").read_text())
    assert "has no box AP for seeds 0, 1, 2" in page.text
    nothing = write(tmp_path / "nothing", record("L2:0", 0, metrics={"bbox/AP": None}))
    page = Page(write_report(find_runs([nothing]), tmp_path / "report", title="t").read_text())
    assert "No run has a value of a metric that is reported." in page.text


def test_one_seed_has_a_reason_and_no_test(tmp_path: Path) -> None:
    result = one_result(tmp_path, record("L2:0", 0), record("L2:3", 0))
    cells = result.table.cells[1]
    assert cells[2:8] == ["1", "41.00", "-", "+1.00", "-", "-"]
    assert cells[8] == "Not tested: one seed says nothing about how results vary over seeds."
    (answer,) = answers([result])
    assert (answer.verdict, "+1.00 (1 not tested)" in answer.sentence) == ("Not tested", True)
    assert "Missing for a test: one seed says nothing about how results vary over seeds." in answer.sentence


def test_without_one_standard_backbone_nothing_is_compared(tmp_path: Path) -> None:
    robust = [record("L2:3", 0), record(None, 0)]
    result = one_result(tmp_path / "none", *robust)
    assert [row.comparison for row in result.rows] == [None, None]
    assert [row.backbone.trained_at for row in result.rows] == ["L2:3", "unknown"]
    assert "there is no standard backbone" in result.rows[0].sentence
    other = record("L2:0", 0, backbone={**record("L2:0", 0).backbone, "source_sha256": "another file"})
    result = one_result(tmp_path / "two", record("L2:0", 0), other, *robust)
    assert len([row for row in result.rows if row.backbone.is_standard]) == 2
    assert "there is more than one standard backbone" in result.rows[-1].sentence
    (answer,) = answers([result])
    assert answer.verdict == "Not compared"
    assert answer.sentence.startswith("Missing for an answer: ")


def test_a_pretraining_a_seed_is_one_backbone(tmp_path: Path) -> None:
    runs = [record(t, s) for t in BACKBONES[:2] for s in range(3)]
    shared = one_result(tmp_path / "shared", *runs)
    assert any("start from one pre-trained file" in remark for remark in shared.experiment.remarks)
    for run in runs:
        run.backbone["source_sha256"] += str(run.seed)
    result = one_result(tmp_path / "own", *runs)
    assert [row.summary.n for row in result.rows] == [3, 3]
    assert not any("start from one pre-trained file" in remark for remark in result.experiment.remarks)
    one_file = [
        replace(run, backbone=run.backbone | {"source_sha256": "one"}) for run in runs if run.threat_model == "L2:0"
    ]
    mixed = one_result(tmp_path / "mixed", *one_file, *(run for run in runs if run.threat_model != "L2:0"))
    (remark,) = (remark for remark in mixed.experiment.remarks if "start from one pre-trained file" in remark)
    assert mixed.experiment.backbones[0].label in remark
    assert mixed.experiment.backbones[1].label not in remark
    # The same architecture, trained on other classes: a backbone of its own, which has no standard one.
    other = {"arch": "resnet50", "num_classes": 100, "source_sha256": "other"}
    beside = one_result(tmp_path / "beside", *runs, *(record(BACKBONES[1], s, backbone=other) for s in range(3)))
    compared = {row.backbone.name: (row.summary.n, row.comparison is not None) for row in beside.rows}
    assert compared.pop("resnet50") == (3, False)
    assert compared == {"resnet50 of 1000 classes": (3, True), "resnet50 of 100 classes": (3, False)}


@pytest.mark.parametrize("seeds", [{"a": (0, 1), "b": (0, 1)}, {"a": (0, 1), "b": (2,)}], ids=["same", "other"])
def test_two_pretrainings_a_seed_are_two_backbones(seeds: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """Of one architecture, threat model and number of classes: the study's names tell them apart."""
    records = []
    for name, own in seeds.items():
        for seed in own:
            backbone = {"arch": "resnet50", "num_classes": 1000, "source_sha256": f"{name}{seed}"}
            records.append(record("L2:3", seed, backbone=backbone))
            records[-1].config["MODEL"]["WEIGHTS"] = f"runs/convert-{name}-{ord(name) + seed:010x}/backbone.pkl"
    (experiment,) = experiments(find_runs([write(tmp_path, *records)]))
    found = {backbone.name: tuple(backbone.runs) for backbone in experiment.backbones}
    assert found == {f"resnet50 ({name})": own for name, own in seeds.items()}


def test_seeds_of_one_backbone_stay_together_where_some_have_no_name(tmp_path: Path) -> None:
    """As in a study half done, whose detectors have run for some seeds and whose transfer for all."""
    records = []
    for seed in range(3):
        backbone = {"arch": "resnet50", "num_classes": 1000, "source_sha256": f"sha{seed}"}
        records.append(record("L2:3", seed, backbone=backbone))
        if seed < 2:
            records[-1].config["MODEL"]["WEIGHTS"] = f"runs/convert-a-{seed:010x}/backbone.pkl"
    (experiment,) = experiments(find_runs([write(tmp_path, *records)]))
    assert [tuple(backbone.runs) for backbone in experiment.backbones] == [(0, 1, 2)]


def test_runs_of_other_settings_are_not_pooled(tmp_path: Path) -> None:
    longer = record("L2:3", 0)
    longer.config["SOLVER"]["MAX_ITER"] = 90_000
    longer.config["SOLVER"]["CHECKPOINT_PERIOD"] = 7  # makes no difference
    found = experiments(find_runs([write(tmp_path, record("L2:0", 0), longer)]))
    assert [experiment.setting for experiment in found] == ["SOLVER.MAX_ITER 270000", "SOLVER.MAX_ITER 90000"]
    assert len({experiment.slug for experiment in found}) == 2


def test_runs_on_other_annotations_are_not_pooled(tmp_path: Path) -> None:
    """Under one name; those of a record of before they were noted are taken for those of the others, if these agree."""
    runs = [record("L2:3", seed) for seed in (0, 1, 2)]
    for run, digest in zip(runs[1:], ("a" * 64, "b" * 64), strict=True):
        run.config["DATASETS"]["CONTENT"] = [["mine", digest]]
    for own in (runs, runs[::-1]):
        found = experiments([RecordedRun(tmp_path, one) for one in own])
        assert sorted((one.setting, len(one.runs)) for one in found) == [
            ("annotations mine aaaaaaaa", 1),
            ("annotations mine bbbbbbbb", 1),
            ("annotations not noted", 1),
        ]
        (one,) = experiments([RecordedRun(tmp_path, one) for one in own if one is not runs[2]])
        assert len(one.runs) == 2


def test_sets_whose_names_are_alike_in_files_have_tables_of_their_own(tmp_path: Path) -> None:
    """Sets named with other letters alone, and test sets of one run called as corruptions are."""
    runs = [record("L2:0", 0, dataset=name, metrics={"bbox/AP": ap}) for name, ap in (("夜", 1.0), ("昼", 2.0))]
    weather = {"fog/bbox/AP": 3.0, "昼/bbox/AP": 4.0, "夜/bbox/AP": 5.0}
    runs.append(record("L2:0", 0, dataset="fog, 昼, 夜", metrics=weather))
    runs[0].backbone["label"] = r"net$\x$"  # no formula, and broken as one
    write_report(find_runs([write(tmp_path / "runs", *runs)]), tmp_path / "report", title="t")
    files = (tmp_path / "report/tables").glob("segmentation*.csv")
    assert sorted(float(row["mean"]) for file in files for row in table(tmp_path / "report", file.stem)) == [
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
    ]


def test_settings_are_named_by_the_few_keys_that_tell_them_apart() -> None:
    probe = {"mode": "linear_probe", "solver": "sgd", "augmentation": "none", "batch_norm": "eval", "epochs": 9}
    settings: list[dict[str, Any]] = [
        {"mode": "full_network", "attack.steps": 3, "epochs": 2},
        probe,
        probe | {"augmentation": "resized_crop"},
        probe | {"augmentation": "resized_crop", "epochs": 90},
        probe | {"solver": "lbfgs", "epochs": 1},
    ]
    assert setting_names(settings) == [
        "full network",
        "linear probe, solver sgd, augmentation none",
        "linear probe, solver sgd, augmentation resized_crop, epochs 9",
        "linear probe, solver sgd, augmentation resized_crop, epochs 90",
        "linear probe, solver lbfgs",
    ]
    assert setting_names(settings[:1]) == [""]
    assert setting_names([{"a": 1}, {}, {"a": "1"}]) == ["a 1, 1", "without a", "a 1, 3"]


def test_a_run_counts_once(tmp_path: Path) -> None:
    twice = [record("L2:0", 0), record("L2:0", 0)]
    result = one_result(tmp_path, *twice)
    assert result.rows[0].summary.n == 1
    assert "is counted once" in result.experiment.remarks[0]
    twice[1].metrics["bbox/AP"] = 1.0
    with pytest.raises(InputError, match=r"same run .* different results"):
        one_result(tmp_path, *twice)
    (run,) = find_runs([tmp_path / "segmentation_coco_2017_val_0", tmp_path / "segmentation_coco_2017_val_0"])
    assert run.record.seed == 0


@pytest.mark.parametrize("names", [("a.pkl", "b.pkl"), ("a/backbone.pkl", "b/backbone.pkl")], ids=["names", "folders"])
def test_two_files_of_one_seed_are_told_apart(names: tuple[str, str], tmp_path: Path) -> None:
    runs = []
    for number, file in enumerate(names):
        backbone = {"arch": "resnet50", "num_classes": 1000, "source_sha256": f"{number}" * 64}
        runs.append(record("L2:3", 0, backbone=backbone))
        runs[-1].config["MODEL"]["WEIGHTS"] = file
    (experiment,) = experiments(find_runs([write(tmp_path, *runs)]))
    told = ("a", "b") if names[0] == "a.pkl" else ("00000000", "11111111")
    assert [backbone.name for backbone in experiment.backbones] == [f"resnet50 ({one})" for one in told]


def test_a_report_is_made_again_from_its_own_records(study: Path, report: Path, tmp_path: Path) -> None:
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(report / "records.jsonl", alone)
    before, after = find_runs([study]), find_runs([alone])
    assert [run.record for run in after] == [run.record for run in before]
    assert find_runs([alone / "records.jsonl"]) == after
    assert find_runs([before[0].folder / "record.json"]) == before[:1]
    assert [run.folder.name for run in after] == [run.folder.name for run in before]
    write_report(after, tmp_path / "again", title="A <study> & its report")
    tables = sorted(path.name for path in (report / "tables").iterdir())
    assert tables == sorted(path.name for path in (tmp_path / "again/tables").iterdir())
    for name in tables:
        assert (tmp_path / "again/tables" / name).read_bytes() == (report / "tables" / name).read_bytes()
    figures = list((tmp_path / "again/figures").glob("*.svg"))  # there are no curves beside the records
    assert figures
    assert all(path.read_bytes() == (report / "figures" / path.name).read_bytes() for path in figures)
    # A report that lies among its own runs, or is given beside them, counts nothing twice.
    assert find_runs([study, report]) == find_runs([report, study]) == before
    assert len(find_runs([report, alone])) == len(before)
    (alone / "records.jsonl").write_text('{"folder": "a", "run_id": 3}\n')
    with pytest.raises(InputError, match="no record in line 1"):
        find_runs([alone])


def test_warnings_of_the_data_are_told(tmp_path: Path) -> None:
    """Records of before that do not have them are read alike."""
    write(tmp_path / "runs", record("L2:0", 0, data_warnings={"mine": {"boxes without area": 7}}), record("L2:3", 0))
    (old,) = (path for path in (tmp_path / "runs").rglob("record.json") if "boxes" not in path.read_text())
    content = json.loads(old.read_text())
    assert content.pop("data_warnings") == {}
    old.write_text(json.dumps(content))
    html = write_report(find_runs([tmp_path / "runs"]), tmp_path / "report", title="t").read_text()
    assert html.count("mine: 7 boxes without area") == 1


def test_mixed_versions_are_flagged(tmp_path: Path) -> None:
    runs = [record(threat_model, seed) for threat_model in BACKBONES[:2] for seed in range(2)]
    assert not one_result(tmp_path / "same", *runs).experiment.mixed_versions
    runs[3] = record("L2:3", 1, versions={"torch": "2.11.0", "numpy": "2"})
    result = one_result(tmp_path / "mixed", *runs)
    assert [row[0] for row in result.table.cells[:2]] == ["resnet50", "resnet50†"]
    (remark,) = [remark for remark in result.experiment.remarks if remark.startswith("†")]
    assert "numpy none in 3, 2 in 1; torch 2.15.0 in 3, 2.11.0 in 1 runs" in remark


def test_the_papers_values_and_why_they_do_not_compare() -> None:
    ours = record("L2:0", 0)
    for result in PAPER[2:]:
        assert paper_result(ours, result.metric) is result
        assert differences_to_paper(ours, result) == []
    assert paper_result(ours, "bbox/AP50") is None
    assert paper_result(record("L2:0", 0, dataset="shapes_val"), "bbox/AP") is None
    other = record("L2:0", 0, dataset="person_val", backbone={"arch": "resnet18", "num_classes": 100})
    other.config["DATASETS"] = {
        "TRAIN": ["person_train"],
        "COCO_FORMAT": [["person_val", "coco_person/a.json", "coco_person/val"]],
    }
    other.config["SOLVER"] = {"MAX_ITER": 150, "IMS_PER_BATCH": 4}
    paper = paper_result(other, "segm/AP")
    assert paper is PAPER[3]
    said = "; ".join(differences_to_paper(other, paper))
    for words in ("resnet18", "100 classes", "person_train", "person_val", "600 training images seen, not 4,320,000"):
        assert words in said
    assert [(p.standard.mean, p.robust.mean) for p in PAPER] == [
        (52.80, 53.87),
        (39.80, 40.07),
        (40.67, 40.91),
        (36.92, 37.08),
    ]


@pytest.mark.parametrize(
    ("metric", "name"),
    [("bbox/AP", "box AP"), ("segm/AP50", "mask AP50"), ("voc/bbox-area/AP", "voc box (area) AP")],
)
def test_metrics_are_named(metric: str, name: str) -> None:
    assert metric_name(metric) == name


def test_the_tool(run_tool: Run, tmp_path: Path) -> None:
    write(tmp_path / "runs", record("L2:0", 0), record("L2:3", 0))
    status, out, _ = run_tool("report", tmp_path / "runs", "--output", tmp_path / "report", "--title", "Ours")
    assert status == 0
    assert "report of 2 records" in out
    assert "<title>Ours</title>" in (tmp_path / "report/report.html").read_text()
    assert "not of this report" not in out
    write(tmp_path / "others", record("L2:0", 0, dataset="other"))
    out = run_tool("report", tmp_path / "others", "--output", tmp_path / "report")[1]
    assert "not of this report, to be removed: " in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no record.json in"),
        ("{", "is not a run record"),
        ("[]", "is not a run record"),
        ('{"run_id": "x"}', "is not a run record"),
        ({"metrics": []}, "metrics"),
        ({"metrics": {"bbox/AP": "high"}}, "metrics"),
        *(({"metrics": {name: 101}}, f"({name} 101") for name in ("a/bbox/AP", "segm/AR100", "x_accuracy_low")),
        ({"metrics": {"accuracy/fog": -1}}, "(accuracy/fog -1"),
        ({"metrics": {"rPC/bbox/AP": 1e308}}, "metrics"),
        ({"threat_model": "L3:1"}, "threat_model"),
        ({"seed": "first"}, "seed"),
        ({"seconds": None}, "seconds"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"data_warnings": {"mine": 3}}, "data_warnings"),
        ({"metrics": {"bbox/AP": 10**400}}, "metrics"),
        ({"backbone": {"arch": ["resnet50"]}}, "TypeError"),
        ({"task": "transfer", "config": {"mode": "linear_probe", "selection": 1}}, "cannot be put into a table"),
        ({"task": "transfer"}, "KeyError('selection')"),
        ({"task": "transfer", "config": {"selection": "lr 0.1"}}, "TypeError"),
        ({"task": "robustness"}, "KeyError('threat_model')"),
        ({"task": "inheritance"}, "KeyError('method')"),
    ],
)
def test_what_is_no_record_is_refused(run_tool: Run, tmp_path: Path, content: Any, words: str) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    if isinstance(content, dict):
        content = json.dumps({**record("L2:0", 0).__dict__, **content})
    if content is not None:
        (folder / "record.json").write_text(content)
    status, _, err = run_tool("report", folder, "--output", tmp_path / "report")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line[:40], "records.jsonl holds no record in line 2 ("),
        (lambda line: line.replace('"seconds"', '"second"'), "records.jsonl holds no record in line 2 ("),
        (lambda line: line.replace('"folder": "', '"folder": 7, "f": "'), "records.jsonl holds no record in line 2 ("),
        (
            lambda line: line.replace('"metrics": {', '"metrics": {"clean_accuracy": 101, '),
            "in line 2 (clean_accuracy 101",
        ),
        (lambda line: line.replace('"L2:3"', '"L3"'), "records.jsonl, line 2 is not a run record (threat_model)"),
        (lambda line: line.replace('"detection"', '"robustness"'), "records.jsonl, line 2 cannot be put into a table"),
    ],
)
def test_a_broken_line_of_records_is_named(
    run_tool: Run, tmp_path: Path, change: Callable[[str], str], words: str
) -> None:
    runs = [RecordedRun(tmp_path / name, record(name, 0, task="detection")) for name in ("L2:0", "L2:3")]
    write_records(runs, tmp_path / "records.jsonl")
    first, second = (tmp_path / "records.jsonl").read_text().splitlines()
    assert change(second) != second
    (tmp_path / "records.jsonl").write_text(f"{first}\n{change(second)}\n\n")
    status, _, err = run_tool("report", tmp_path, "--output", tmp_path / "report")
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert words in err


@pytest.mark.parametrize("content", ["", "[", "null", "[1]", "{}", "\0", '{"metric": "a", "runs": 7}', "[" * 100_000])
def test_a_damaged_declaration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "primary.json").write_text(content)
    with pytest.raises(InputError, match=r"primary\.json declares no comparison .*: remove it"):
        find_primary([tmp_path])


def test_paths_of_bytes_that_are_no_text_are_reported(run_tool: Run, tmp_path: Path) -> None:
    """As a folder called in Latin-1 has them: what differs between two runs is said in every table."""
    one, other = (
        record("L2:0", seed, config={"DATASETS": {"TRAIN": [train]}}) for seed, train in ((0, "\udce9"), (1, "b"))
    )
    write(tmp_path / "runs", one, other)
    status, _, err = run_tool("report", tmp_path / "runs", "--output", tmp_path / "report")
    assert status == 0, err


def test_other_bad_input_is_refused(run_tool: Run, tmp_path: Path) -> None:
    write(tmp_path / "runs", record("L2:0", 0))
    file = tmp_path / "file"
    file.write_text("")
    for arguments, words in (
        ([tmp_path / "none", "--output", tmp_path / "report"], "no folder"),
        (["--output", tmp_path / "report"], "folders of runs"),
        ([tmp_path / "runs", "--output", file], "choose another --output"),
        ([tmp_path / "runs", "--output", tmp_path / "report", "--pictures", -1], "--pictures"),
    ):
        status, _, err = run_tool("report", *arguments)
        assert (status, len(err.strip().splitlines())) == (2, 1), err
        assert words in err
    (tmp_path / "runs/segmentation_coco_2017_val_0/metrics.json").write_text('{"x": }\n')
    status, _, err = run_tool("report", tmp_path / "runs", "--output", tmp_path / "report")
    assert status == 2
    assert "metrics.json is damaged" in err


def test_many_backbones_fit_into_the_figures(tmp_path: Path) -> None:
    """The standard one and the best are drawn; the CSV has all."""
    runs = [record(f"L2:{epsilon}", 0, metrics={"bbox/AP": 40.0 + epsilon}) for epsilon in range(10)]
    (experiment,) = experiments(find_runs([write(tmp_path, *runs)]))
    picture = training_figure(experiment, "total_loss", tmp_path / "loss")
    assert picture is not None
    assert "Of 10 backbones, the standard one and those with the highest box AP" in picture.caption
    assert [f"L2:{epsilon} from" in picture.alt for epsilon in range(10)] == [True] + [False] * 3 + [True] * 6
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert {row["trained_at"] for row in rows} == {f"L2:{epsilon}" for epsilon in range(10)}
    assert training_figure(experiment, "segm/AP", tmp_path / "none") is None


def test_every_line_is_told_without_its_colour() -> None:
    assert len({str(line) for line in LINES}) == len(set(MARKERS)) == len(set(COLORS)) == len(COLORS)


def test_the_table_of_detectors_robustness(tmp_path: Path) -> None:
    """A row a detector and measure, its numbers under the right heads; single cells have none."""
    attack = {"threat_model": {"norm": "Linf", "epsilon": 2 / 255}, "schedule": "fixed", "steps": 10}
    apgd = {"threat_model": {"norm": "L2", "epsilon": 0.5}, "schedule": "apgd", "steps": 5}

    def detector(name: str, trained: str, attacks: dict[str, Any], metrics: dict[str, float]) -> RunRecord:
        config = {"cells": [], "images": 40, "measure": "bbox/AP", "adversarial_training": trained, "attacks": attacks}
        metrics |= {"P/bbox/AP": 40.0, "mPC/bbox/AP": 20.0, "rPC/bbox/AP": 50.0, "P/segm/AP": 36.0}
        return record("L2:3", 0, task="detector_robustness", run_id=name, metrics=metrics, config=config)

    hard = detector("hard", "free Linf:2/255", {"attack-total": apgd}, {"attack-total/bbox/AP": 31.0})
    by_name = {"attack-mask": attack, "attack-total": attack, "attack-worst": {"attacks": ["a", "b"]}}
    plain = detector("plain", "", by_name, {f"{name}/bbox/AP": float(i) for i, name in enumerate(by_name)})
    cell = record("L2:3", 0, task="detector_robustness", config={"cell": "clean"})
    write_report(find_runs([write(tmp_path / "runs", hard, cell, plain)]), tmp_path / "report", title="Robust?")
    rows = table(tmp_path / "report", "robustness_of_detectors")
    assert [list(row.values())[:5] for row in rows] == [
        [name, "coco_2017_val (n = 40)", "L2:3", kind, measure]
        for name, kind in (("plain", "standard"), ("hard", "free Linf:2/255"))
        for measure in ("bbox/AP", "segm/AP")
    ]
    attacks = ["total (L2:0.5, APGD-5)", "mask (Linf:2/255, PGD-10)", "total (Linf:2/255, PGD-10)", "worst of 2"]
    numbers = [[row[head] for head in ("clean", "mPC", "rPC", *attacks)] for row in rows]
    assert numbers == [
        ["40.0", "20.0", "50.0", "", "0.0", "1.0", "2.0"],
        ["36.0", *[""] * 6],
        ["40.0", "20.0", "50.0", "31.0", "", "", ""],
        ["36.0", *[""] * 6],
    ]


def test_detectors_robustness_is_tested_by_the_seed_of_training(tmp_path: Path) -> None:
    """Evaluations have one seed, detectors several; single corruptions and what the weights are tell nothing apart."""

    def evaluated(threat_model: str | None, seed: int, attacked: float) -> RunRecord:
        config = {"SEED": seed, "weights_sha256": f"{threat_model} {seed}", "cells": ["clean", "fog-3"], "images": 8}
        config |= {"measure": "bbox/AP", "adversarial_training": "", "attacks": {}, "warnings": {}}
        if seed == 1:
            config["warnings"] = {"attack-total": ["weak"]}
        metrics = {"P/bbox/AP": 40.0, "fog-3/bbox/AP": 9.0, "corrupted/bbox/AP": 9.0, "attack-total/bbox/AP": attacked}
        changes: dict[str, Any] = {"config": config, "metrics": metrics}
        if threat_model is None:
            config["MODEL.BACKBONE.FROM_SCRATCH"] = True
            changes["backbone"] = {}
        return replace(record(threat_model, seed, task="detector_robustness", **changes), seed=0)

    records = [evaluated("L2:0", seed, 10.0 + seed) for seed in range(3)]
    records += [evaluated("L2:3", seed, 20.0 + seed + 0.1 * seed) for seed in range(3)]
    records += [evaluated(None, seed, 1.0 + 2 * seed) for seed in range(3)]
    cell = record("L2:0", 0, task="detector_robustness", config={"cell": "clean"})
    (experiment,) = experiments(find_runs([write(tmp_path, *records, cell)]))
    assert [backbone.trained_at for backbone in experiment.backbones] == ["L2:0", "L2:3", "from scratch"]
    assert experiment.metrics == ["P/bbox/AP", "corrupted/bbox/AP", "attack-total/bbox/AP"]
    attacked = {row.backbone.trained_at: row for row in results(experiment)[-1].rows}
    assert attacked["L2:3"].comparison is not None
    assert attacked["L2:3"].comparison.seeds == (0, 1, 2)
    assert attacked["L2:3"].comparison.difference == pytest.approx(10.1)
    assert attacked["from scratch"].comparison is not None
    assert attacked["from scratch"].comparison.difference == pytest.approx(-8.0)
    assert report_command.draw(experiment, tmp_path, 1) is None  # an evaluation is no detector


def test_the_mean_over_all_corruptions_is_tested_once(tmp_path: Path) -> None:
    """mPC, and the mean over those that there are, are then the same numbers: one hypothesis for Holm's correction."""

    def evaluated(threat_model: str, seed: int) -> RunRecord:
        config = {"SEED": seed, "weights_sha256": f"{threat_model} {seed}", "cells": [], "attacks": {}}
        value = (5.0 if threat_model == "L2:3" else 2.0) + seed**2
        metrics = {f"{cell}/bbox/AP": value for cell in ("mPC", "corrupted")} | {"rPC/bbox/AP": 3 * value}
        return replace(record(threat_model, seed, task="detector_robustness", config=config, metrics=metrics), seed=0)

    records = [evaluated(threat_model, seed) for threat_model in ("L2:0", "L2:3") for seed in range(3)]
    (experiment,) = experiments(find_runs([write(tmp_path, *records)]))
    assert experiment.metrics == ["mPC/bbox/AP", "rPC/bbox/AP"]


def test_the_floor_stands_beside_what_it_is_the_floor_of(tmp_path: Path) -> None:
    """A random backbone is a backbone; nothing else may differ."""
    runs = [record("L2:0", seed) for seed in range(2)]
    for seed in range(2):
        floor = record(None, seed, backbone={})
        floor.config["MODEL"]["BACKBONE"]["FROM_SCRATCH"] = True
        floor.config["MODEL"]["WEIGHTS"] = ""
        runs.append(floor)
    (experiment,) = experiments(find_runs([write(tmp_path / "a", *runs)]))
    assert [(b.name, b.trained_at) for b in experiment.backbones] == [
        ("resnet50", "L2:0"),
        ("from scratch", "from scratch"),
    ]
    # It is not robust, whatever comes out of it.
    assert report_command.draw(experiment, tmp_path, 1) is None
    assert class_figure(experiment, "bbox", tmp_path / "classes") is None
    runs[-1].config["MODEL"]["RESNETS"] = {"NORM": "SyncBN"}
    assert len(experiments(find_runs([write(tmp_path / "b", *runs)]))) == 2


def test_robust_accuracy_is_reported_where_there_is_an_adversary(tmp_path: Path) -> None:
    def metrics(name: str, **config: str) -> list[str]:
        one = record("L2:0", 0, task="transfer", metrics={"clean_accuracy": 80.0, "robust_accuracy": 60.0})
        one.config.update(config)
        (experiment,) = experiments(find_runs([write(tmp_path / name, one)]))
        return experiment.metrics

    assert metrics("a", eval_threat_model="L2:0.5") == ["clean_accuracy", "robust_accuracy"]
    assert metrics("b", eval_threat_model="L2:0") == metrics("c") == ["clean_accuracy"]


def transferred(
    arch: str, threat_model: str, values: tuple[float, ...], label: str = "", **config: Any
) -> list[RunRecord]:
    """Trials of one backbone on one data set."""
    backbone = {"arch": arch, "num_classes": 1000, "label": label or f"{arch} {threat_model}", "source_sha256": label}
    return [
        record(
            threat_model,
            seed,
            task="transfer",
            dataset="pets",
            backbone=backbone,
            metrics={"clean_accuracy": value},
            config={"mode": "linear_probe", "eval_threat_model": "L2:0", **config},
        )
        for seed, value in enumerate(values)
    ]


ARCHS = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "densenet161", "wide_resnet50_2", "shufflenet_v2_x1_0")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An experiment of seven architectures, a standard and a robust backbone of each."""
    records = []
    for place, arch in enumerate(ARCHS):
        records += transferred(arch, "L2:0", (10.0 * place + 1.0, 10.0 * place + 2.0, 10.0 * place + 2.5))
        records += transferred(arch, "L2:1", (10.0 * place, 10.0 * place + 3.0, 13.0 * place))
    records += transferred("resnet18", "L2:0", (50.0, 51.0, 52.0), label="resnet18_stylized")
    (experiment,) = experiments(find_runs([write(tmp_path_factory.mktemp("several"), *records)]))
    return experiment


def test_each_backbone_is_compared_with_the_standard_one_of_its_architecture(several: Any) -> None:
    result: Any
    (result,) = results(several)
    by_name = {row.backbone.name: row for row in result.rows}
    for arch in ARCHS:
        own, base = (
            list(by_name[f"{arch} {model}"].backbone.values("clean_accuracy").values()) for model in ("L2:1", "L2:0")
        )
        assert by_name[f"{arch} L2:0"].comparison is None
        assert by_name[f"{arch} L2:1"].comparison.difference == pytest.approx(fmean(own) - fmean(base))
    assert by_name["resnet18_stylized"].comparison.difference == pytest.approx(51.0 - 5.5 / 3)  # it is no reference
    # Of one architecture there are two standard backbones: there alone nothing is compared.
    twins = [several.backbones[0], replace(several.backbones[0], name="twin")]
    doubled = replace(several, backbones=(*several.backbones, twins[1]))
    family = twins[0].family
    lacking = {
        row.backbone.family for row in results(doubled)[0].rows if not row.comparison and not row.backbone.is_standard
    }
    assert lacking == {family}


def test_intervals_stay_within_the_bounds_of_what_they_are_of(several: Any) -> None:
    result: Any
    (result,) = results(several)
    for row in result.rows:
        assert row.summary.low >= 0
        assert row.summary.high <= 100
        assert row.comparison is None or -100 <= row.comparison.low <= row.comparison.high <= 100
    assert any(row.summary.low == 0 for row in result.rows)
    assert [bounds(f"{cell}/bbox/AP") for cell in ("P", "rPC")] == [(0, 100), (0, float("inf"))]


def test_architectures_are_distinguishable_without_colour(several: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Each has another colour, another marker and another line, and the legend has them all."""
    figures: list[Figure] = []
    monkeypatch.setattr(study_figures, "save", lambda figure, *_: figures.append(figure))
    study_figures.epsilon_figure(several, "clean_accuracy", tmp_path / "x")
    panel: Any
    (panel,) = figures[0].axes
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    handles = [container.lines[0] for container in panel.containers]
    assert len({*labels}) == len(handles) == len(ARCHS)
    for look in (lambda h: h.get_color(), lambda h: h.get_marker(), lambda h: str(h._dash_pattern)):
        assert len({look(handle) for handle in handles}) == len(ARCHS)
    bars: Any = Figure().subplots()
    grouped_bars(bars, [0, 1], {str(i): [1.0, 2.0] for i in range(MOST_CURVES)})
    assert len({container[0].get_hatch() for container in bars.containers}) == MOST_CURVES


@pytest.mark.parametrize("folder", ["detector_robustness", "inheritance", "study", "transfer_figures"])
def test_every_task_of_the_documentations_records_has_an_answer(folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Its question, and what was seen in numbers or what is missing."""
    runs = find_runs([Path(__file__).parents[2] / "docs" / folder])
    found = answers([result for experiment in experiments(runs) for result in results(experiment)])
    tasks = {run.record.task for run in runs}
    assert {answer.question for answer in found} == {QUESTIONS[task] for task in tasks & QUESTIONS.keys()}
    if folder == "inheritance":
        monkeypatch.setattr(inheritance, "save", lambda figure, path, rows, caption, alt: Picture(path, caption, alt))
        found += [answer for answer, _ in inheritance.inheritance_pages(runs, tmp_path)]
    assert found
    for answer in found:
        assert re.match("Better in|Worse in|Not distinguishable|Not tested|Not compared", answer.verdict)
        assert re.search(r"[-+][0-9]|Missing for an answer", answer.sentence)
        assert answer.details


def cells(label: str, trained_at: str | None, gain: float, *, arch: str = "resnet18", **config: Any) -> list[RunRecord]:
    """Of two sets, one method and two seeds: fine-tuning on either one moves the accuracy on the other by ``gain``."""
    found = []
    for method, target, seed in [("pretrained", "", 0), *product(["fine_tuning"], "ab", (0, 1))]:
        value = 50.0 + (gain + 0.01 * seed * gain if target else 0.0)
        metrics: dict[str, float | None] = {"accuracy/a": value, "accuracy/b": value, "accuracy/pretraining": 50.0}
        backbone = {"arch": arch, "num_classes": 10, "stem": "imagenet", "label": label}
        own = {"method": method, "target": target, **config}
        where = f"{label}/{method}/{target}/{seed}"
        found.append(RunRecord(where, "inheritance", backbone, trained_at, "a", metrics, seed, own, 1.0))
    return found


def inherited(folder: Path, *records: RunRecord) -> list[tuple[str, str, str]]:
    """What is said of them; the figures are other tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
        runs = [RecordedRun(folder / str(place), record) for place, record in enumerate(records)]
        pages = inheritance.inheritance_pages(runs, folder)
    return [(page.title, answer.verdict, answer.sentence) for answer, page in pages]


def test_inheritance_is_compared_within_one_setting_and_one_kind_of_network(tmp_path: Path) -> None:
    standard, robust = cells("standard", "L2:0", 1.0), cells("robust", "L2:3", 3.0)
    ((title, verdict, sentence),) = inherited(tmp_path, *standard, *robust)
    assert title == "Inheritance of robustness (a, b)"
    assert "mRI of fine_tuning +2.01" in sentence
    assert inherited(tmp_path, *standard, *robust, *robust) == [(title, verdict, sentence)]  # a copy counts once
    # Another learning rate is another comparison, for which there is no standard backbone.
    faster = inherited(tmp_path, *standard, *robust, *cells("robust", "L2:3", 9.0, lr=0.1))
    assert [(one[0], one[1]) for one in faster] == [
        ("Inheritance of robustness (a, b, lr 0.001)", verdict),
        ("Inheritance of robustness (a, b, lr 0.1)", "Not compared"),
    ]
    # Of unknown training is not standard, and of another architecture none to compare with.
    ((_, verdict, sentence),) = inherited(tmp_path, *cells("standard", None, 1.0), *robust)
    assert verdict == "Not compared"
    assert "no standard backbone of the same architecture" in sentence
    ((_, verdict, _),) = inherited(tmp_path, *cells("standard", "L2:0", 1.0, arch="resnet50"), *robust)
    assert verdict == "Not compared"
    ((_, verdict, sentence),) = inherited(tmp_path, *standard, *robust, *cells("unknown", None, 2.0))
    assert "mRI of fine_tuning +1.01 to +2.01" in sentence
    with pytest.raises(InputError, match=r"/6 and .*/11, two records of robust/fine_tuning/a/0, have different"):
        inherited(tmp_path, *standard, *robust, *cells("robust", "L2:3", 9.0))


@given(st.lists(st.sampled_from(["better", "worse", ALIKE, "not tested", None]), min_size=1, max_size=9))
def test_a_verdict_counts_what_was_compared(verdicts: list[str | None]) -> None:
    p_holm = {"better": 0.01, "worse": 0.01, ALIKE: 0.5}
    made = [
        Comparison((0, 1), (), -1.0 if v == "worse" else 1.0, p_holm=p_holm.get(v), reason="" if v in p_holm else "r")
        if v
        else None
        for v in verdicts
    ]
    verdict, sentence = conclude({"AP": made})
    counts = Counter(v for v in verdicts if v)
    for name in ("better", "worse"):
        assert (f"{name} in {counts[name]}" in verdict.lower()) == bool(counts[name])
    if not counts["better"] and not counts["worse"]:
        assert verdict.lower() == (ALIKE if counts[ALIKE] else "not tested" if counts else "not compared")
    assert ("Missing" in sentence) == (not counts or counts["not tested"] > 0)


def test_every_term_on_the_page_is_explained(page: Page) -> None:
    """Heads of tables, names of metrics and of threat models."""
    explained = page.text[page.text.rindex("How to read the numbers") :]
    assert len(page.all("dl")) == 1
    said = page.text[: page.text.rindex("How to read the numbers")]
    for pattern in (r"AP50", r"AP75", r"L2:", r"Linf:", r"PGD", r"d_z", r"Holm", r"ε", r"\bAP\b", r"±"):
        assert bool(re.search(pattern, said)) <= bool(re.search(pattern, explained)), pattern


def test_on_narrow_screens_tables_are_cards(report: Path) -> None:
    """Each cell says what it is, so that a row can be read from top to bottom, its verdict first."""
    page = Page((report / "report.html").read_text())
    assert all(cell.get("data-head") for cell in page.all("td"))
    assert re.search(r"max-width: 40rem.*td[.]words [{] order: -1", STYLE, re.DOTALL)


def test_a_legend_has_the_columns_that_a_figure_has_room_for() -> None:
    for letters, columns in ((3, 3), (25, 2), (40, 1)):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name in "abcd":
            axes.plot([0, 1], label=name * letters)
        legend_above(figure, 3)
        (legend,) = figure.legends
        assert legend._ncols == columns
        assert legend.get_window_extent().width <= figure.bbox.width
