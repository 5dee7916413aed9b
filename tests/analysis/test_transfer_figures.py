"""The paper's tables and figures of transfer: what is joined, chosen, fitted and drawn is what the records say."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy import stats

from robust_backbones.analysis import figures
from robust_backbones.analysis.figures import MARKERS, Picture, save
from robust_backbones.analysis.paper import drawing
from robust_backbones.analysis.paper.transfer_figures import best_table, transfer_pages
from robust_backbones.analysis.paper.transfer_results import (
    STAND_IN,
    Curve,
    Pretraining,
    Pretrainings,
    Trials,
    curves,
    over_architectures,
    over_epsilons,
    pairs,
    targets,
)
from robust_backbones.analysis.paper.values import (
    TRANSFER_SOURCE,
    differences_to_paper_transfer,
    paper_transfer,
    paper_transfer_linf,
    table_2,
)
from robust_backbones.analysis.records import RecordedRun, find_runs
from robust_backbones.analysis.report import write_report
from robust_backbones.analysis.statistics import linear_fit
from robust_backbones.checkpoint.format import sha256
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.analysis.test_report import Page

EPSILONS = ("L2:0", "L2:0.5", "L2:1", "L2:3")
ARCHS = ("resnet18", "resnet50", "wide_resnet50_2")
SEEDS = (0, 1, 2)
MODES = ("linear_probe", "full_network")
Rows = list[dict[str, str]]


def trial(
    label: str, arch: str, threat_model: str | None, dataset: str, seed: int, accuracy: float, **config: Any
) -> RunRecord:
    """A trial as tools/transfer.py writes it."""
    settings = {"mode": "linear_probe", "metric": "top1", "solver": "sgd", "epochs": 20, "image_size": 64}
    settings |= {"images_per_class": 0, "num_outputs": 0, "normalize": True, "seeds": list(SEEDS), "lrs": [0.01]}
    selection = {"selected": "lr0.01", "on": "nothing", "scores": {}}
    return RunRecord(
        run_id=f"{label}/seed_{seed}",
        task="transfer",
        backbone={"arch": arch, "num_classes": 100, "source_sha256": f"sha of {label}", "label": label},
        threat_model=threat_model,
        dataset=dataset,
        metrics={"clean_accuracy": accuracy},
        seed=seed,
        config=json.loads(json.dumps({**settings, "selection": selection, **config})),
        seconds=1.0,
        git_commit=None,
        versions={"torch": "2"},
    )


def classifier(
    label: str, arch: str, threat_model: str, accuracy: float, *, dataset: str = "tiny", **config: Any
) -> RunRecord:
    """A record of pre-training."""
    return RunRecord(
        run_id=label,
        task="pretrain",
        backbone={"arch": arch, "num_classes": 100},
        threat_model=threat_model,
        dataset=dataset,
        metrics={"clean_accuracy": accuracy, "robust_accuracy": 1.0, "best/clean_accuracy": accuracy + 0.25},
        seed=0,
        config=config,
        seconds=1.0,
        git_commit=None,
        versions={},
    )


def write(folder: Path, *records: RunRecord) -> list[RecordedRun]:
    for number, record in enumerate(records):
        record.write(folder / f"{number:04d}" / "record.json")
    return find_runs([folder])


def accuracy_of(arch: str, threat_model: str, dataset: str, seed: int, *, mode: str, downscale: int) -> float:
    """Made up, and another for every trial; more ε is better for reduced images alone."""
    key = [ARCHS.index(arch), EPSILONS.index(threat_model), len(dataset), seed, MODES.index(mode), downscale]
    noise = float(np.random.default_rng(key).normal(0, 0.5))
    slope = 3 if downscale else -2
    return 60 + 4 * ARCHS.index(arch) + slope * EPSILONS.index(threat_model) + noise


def source_accuracy(arch: str, threat_model: str) -> float:
    return 40 + 3.5 * ARCHS.index(arch) - 4.3 * EPSILONS.index(threat_model) ** 1.2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[RecordedRun]:
    """3 architectures x 4 epsilons on two data sets, in both modes, one set reduced for probes; and a stylized one."""
    records = [
        trial(
            f"{arch}_{model}".replace(":", "_"), arch, model, dataset, seed,
            accuracy_of(arch, model, dataset, seed, mode=mode, downscale=downscale),
            mode=mode, **({"downscale": downscale} if downscale else {}),
        )
        for mode in MODES
        for dataset, downscale in (("cifar10", 0), ("caltech101_mini", 0), ("caltech101_mini", 32))
        for arch in ARCHS for model in EPSILONS for seed in SEEDS
        if not downscale or mode == "linear_probe"
    ]  # fmt: skip
    records += [trial("texture", "resnet18", "L2:0", "cifar10", seed, 99.0 + seed / 10) for seed in SEEDS]
    records += [
        classifier(f"{arch}_{model}".replace(":", "_"), arch, model, source_accuracy(arch, model))
        for arch in ARCHS
        for model in EPSILONS
    ]
    records.append(classifier("texture", "resnet18", "L2:0", 30.0, stylize=1.0))
    return write(tmp_path_factory.mktemp("study"), *records)


Drawn = dict[str, tuple[Figure, Sequence[Any]]]
"""Name of a figure -> itself, and the rows of its CSV."""


@pytest.fixture(scope="module")
def made(study: list[RecordedRun], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    """A report, and its figures."""
    output, found = tmp_path_factory.mktemp("report"), Drawn()

    def keep(figure: Figure, path: Path, rows: Sequence[Any], caption: str, alt: str) -> Picture:
        found[path.name] = figure, rows
        return save(figure, path, rows, caption, alt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", keep)
        patch.setattr(figures, "DPI", 30)
        write_report(study, output, title="Transfer")
    return output, found


@pytest.fixture(scope="module")
def report(made: tuple[Path, Drawn]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def drawn(made: tuple[Path, Drawn]) -> Drawn:
    return made[1]


def numbers(report: Path, stem: str) -> Rows:
    return list(csv.DictReader((report / "figures" / f"transfer_{stem}.csv").open()))


def values(arch: str, model: str, dataset: str, mode: str = "linear_probe", downscale: int = 0) -> list[float]:
    return [accuracy_of(arch, model, dataset, seed, mode=mode, downscale=downscale) for seed in SEEDS]


def assert_trials(row: dict[str, str], expected: list[float]) -> None:
    assert [float(value) for value in row["trials"].split()] == expected
    assert [float(row[key]) for key in ("mean", "min", "max")] == [fmean(expected), min(expected), max(expected)]
    assert int(row["n"]) == len(expected)


# --- the join --------------------------------------------------------------------------------------------------------


def pretrained(folder: Path, record: RunRecord, **weights: bytes) -> RecordedRun:
    record.write(folder / "record.json")
    for name, content in weights.items():
        (folder / f"{name}.pt").write_bytes(content)
    return RecordedRun(folder, record)


def of_file(content: bytes, folder: Path, label: str = "any") -> RunRecord:
    (folder / "file").write_bytes(content)
    record = trial(label, "resnet18", "L2:0", "cifar10", 0, 50.0)
    record.backbone["source_sha256"] = sha256(folder / "file")
    return record


def test_weights_tell_the_pretraining_whatever_they_are_called(tmp_path: Path) -> None:
    run = pretrained(
        tmp_path / "own", classifier("own", "resnet18", "L2:0", 33.0), checkpoint=b"last weights", best=b"best weights"
    )
    found = Pretrainings([run])
    assert found.of(of_file(b"last weights", tmp_path)) == Pretraining(33.0, "tiny", stylized=False)
    assert found.of(of_file(b"best weights", tmp_path)) == Pretraining(33.25, "tiny", stylized=False)
    # The run was made again: its name is the same, its weights and their accuracy are not.
    assert found.of(of_file(b"older weights", tmp_path, label="own")) is None


def test_a_record_names_its_weights_where_they_do_not_lie(tmp_path: Path) -> None:
    """So a report's records.jsonl alone is enough, whatever transfer calls the backbone."""
    record = classifier("own", "resnet18", "L2:0", 33.0)
    record.backbone["best_sha256"] = of_file(b"best weights", tmp_path).backbone["source_sha256"]
    found = Pretrainings([pretrained(tmp_path / "own", record)])
    assert found.of(of_file(b"best weights", tmp_path)) == Pretraining(33.25, "tiny", stylized=False)
    assert found.of(of_file(b"older weights", tmp_path, label="own")) is None


def test_without_weights_the_name_tells_if_nothing_speaks_against_it(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "own", classifier("own", "resnet18", "L2:0", 33.0))
    found = Pretrainings([run])
    record = trial("own", "resnet18", "L2:0", "cifar10", 0, 50.0)
    assert found.of(record) == Pretraining(33.0, "tiny", stylized=False)
    assert found.of(trial("other", "resnet18", "L2:0", "cifar10", 0, 50.0)) is None
    assert found.of(trial("own", "resnet50", "L2:0", "cifar10", 0, 50.0)) is None
    assert found.of(trial("own", "resnet18", "L2:3", "cifar10", 0, 50.0)) is None
    twice = pretrained(tmp_path / "again", classifier("own", "resnet18", "L2:0", 12.0))
    assert Pretrainings([run, twice]).of(record) is None


def test_published_backbones_are_known() -> None:
    record = trial("resnet50_l2_eps3", "resnet50", "L2:3", "cifar10", 0, 50.0)
    assert Pretrainings([]).of(record) is None  # of that name, but with 100 classes
    record.backbone["num_classes"] = 1000
    assert Pretrainings([]).of(record) == Pretraining(62.83, "ImageNet", stylized=False)


@pytest.mark.parametrize(
    ("config", "dataset", "stylized"),
    [
        ({}, "tiny", False),
        ({"stylize": 0.5}, "tiny", True),
        ({}, "Stylized-ImageNet", True),
        ({"stylize": 0}, "x", False),
    ],
)
def test_what_is_stylized(tmp_path: Path, config: dict[str, Any], dataset: str, stylized: bool) -> None:
    run = pretrained(tmp_path / "own", classifier("own", "resnet18", "L2:0", 33.0, dataset=dataset, **config))
    record = trial("own", "resnet18", "L2:0", "cifar10", 0, 50.0)
    (target,) = targets(write(tmp_path / "runs", record), Pretrainings([run]))
    assert target.sources[0].kind == ("stylized" if stylized else "standard")


def test_a_pretraining_a_seed_has_their_mean_accuracy(tmp_path: Path) -> None:
    runs, records = [], []
    for seed in (0, 1):
        content = f"weights {seed}".encode()
        runs.append(
            pretrained(tmp_path / str(seed), classifier("x", "resnet18", "L2:0", 30.0 + seed), checkpoint=content)
        )
        records.append(trial("x", "resnet18", "L2:0", "cifar10", seed, 50.0))
        records[-1].backbone["source_sha256"] = of_file(content, tmp_path).backbone["source_sha256"]
    (target,) = targets(write(tmp_path / "runs", *records), Pretrainings(runs))
    assert [source.pretraining for source in target.sources] == [Pretraining(30.5, "tiny", stylized=False)]
    (target,) = targets(find_runs([tmp_path / "runs"]), Pretrainings(runs[:1]))
    assert target.sources[0].pretraining is None  # half of it is not known


def test_networks_of_other_pretraining_are_apart(tmp_path: Path) -> None:
    """A network as it is, and trained on for other classes: neither pooled, nor the standard of the other's robust."""
    given = [("as_it_is", "L2:0", 90.0), ("clean", "L2:0", 50.0), ("robust", "L2:3", 60.0)]
    records = [trial(name, "resnet18", model, "cifar10", seed, value) for name, model, value in given for seed in SEEDS]
    for record in records[: len(SEEDS)]:
        record.backbone["num_classes"] = 1000
    (target,) = targets(write(tmp_path, *records), Pretrainings([]))
    assert target.archs == ["resnet18", "resnet18 of 100 classes"]
    (curve,) = curves(target, "resnet18 of 100 classes").values()
    assert [(epsilon, trials.mean) for epsilon, trials in curve.points] == [(0.0, 50.0), (3.0, 60.0)]
    assert curves(target, "resnet18") == {}
    (row,) = best_table("linear_probe", [target]).rows
    assert (row["standard"], row["best robust"], row["difference"]) == (50.0, 60.0, 10.0)


# --- R² --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=20))
def test_r_squared_is_the_share_of_variance_that_numpys_line_explains(points: list[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    assume(np.std(x) > 1e-3)
    assume(np.std(y) > 1e-3)
    fit = linear_fit(x, y)
    assert fit is not None
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - slope * np.asarray(x) - intercept
    assert fit.slope == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert fit.intercept == pytest.approx(intercept, rel=1e-6, abs=1e-6)
    assert fit.r_squared == pytest.approx(1 - (residuals**2).mean() / np.var(y), abs=1e-6)


def test_r_squared_by_hand() -> None:
    # Means 2 and 4; slope (-1 * -2 + 0 * -1 + 1 * 3) / 2 = 2.5; residuals 0.5, -1, 0.5; 1 - 1.5 / 14.
    fit = linear_fit([1, 2, 3], [2, 3, 7])
    assert fit is not None
    assert (fit.slope, fit.intercept) == (2.5, -1.0)
    assert fit.r_squared == pytest.approx(1 - 1.5 / 14)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([], []), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5])])
def test_no_line_where_it_would_say_nothing(x: list[float], y: list[float]) -> None:
    assert linear_fit(x, y) is None


def test_the_papers_table_2_has_the_r_squared_that_it_prints() -> None:
    found = []
    for points in table_2().values():
        fit = linear_fit(*zip(*points.values(), strict=True))
        assert fit is not None
        found.append((len(points), round(fit.r_squared, 2)))
    assert found == [(6, 0.79), (6, 0.97)]


# --- the paper's numbers ---------------------------------------------------------------------------------------------

# Table 1 as the submission's own file has it (latex/headline-table.tex): robust, standard.
HEADLINE = {
    "linear_probe": {
        "aircraft": (43.38, 38.69), "birdsnap": (49.19, 48.35), "cifar10": (95.53, 81.31), "cifar100": (81.08, 60.14),
        "caltech101": (92.32, 90.12), "caltech256": (83.34, 82.78), "cars": (48.74, 44.63), "dtd": (70.22, 70.09),
        "flowers": (91.26, 91.90), "food": (65.95, 65.79), "pets": (91.85, 91.83), "sun397": (55.74, 55.92),
    },
    "full_network": {
        "aircraft": (86.08, 86.57), "birdsnap": (76.06, 75.71), "cifar10": (98.68, 97.63), "cifar100": (89.04, 85.99),
        "caltech101": (95.29, 94.75), "caltech256": (87.31, 86.55), "cars": (91.48, 91.52), "dtd": (75.94, 75.80),
        "flowers": (97.21, 97.04), "food": (88.99, 88.64), "pets": (94.24, 94.20), "sun397": (64.74, 63.72),
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", HEADLINE)
def test_the_papers_table_1_follows_from_its_appendix(mode: str) -> None:
    for dataset, (robust, standard) in HEADLINE[mode].items():
        papers = [paper_transfer(dataset, arch, mode) for arch in (*ARCHS, "wide_resnet50_4")]
        means = [paper.means for paper in papers if paper]
        assert len(means) == 4
        assert max(found[0.0] for found in means) == pytest.approx(standard, abs=0.011)  # both are rounded
        assert max(v for found in means for eps, v in found.items() if eps) == pytest.approx(robust, abs=0.011)
        for paper in papers:
            assert paper is not None
            assert paper.best_trial is not None
            epsilon, best = paper.best_trial
            assert best >= paper.means.get(epsilon, 0.0)


def test_linf_backbones_stand_beside_the_papers(tmp_path: Path) -> None:
    """Rows of small_datasets_linf_models.tex; its standard backbones are trials of their own, near the l2 table's."""
    assert paper_transfer_linf("cifar10", "resnet18", "full_network")[4.0] == 97.04
    assert paper_transfer_linf("cifar100", "resnet50", "linear_probe") == {
        0.0: 55.57, 0.5: 72.89, 1.0: 74.16, 2.0: 76.22, 4.0: 77.17, 8.0: 76.70
    }  # fmt: skip
    assert not paper_transfer_linf("pets", "resnet18", "linear_probe")
    for dataset in ("cifar10", "cifar100"):
        for arch in ("resnet18", "resnet50"):
            for mode in HEADLINE:
                of_l2 = paper_transfer(dataset, arch, mode)
                assert of_l2 is not None
                assert paper_transfer_linf(dataset, arch, mode)[0.0] == pytest.approx(of_l2.means[0.0], abs=2.5)
    records = [
        trial(model.replace("/", "_"), "resnet18", model, "cifar10", seed, 90.0 + seed, mode="linear_probe")
        for model in ("L2:0", "Linf:4/255", "L2:3")
        for seed in SEEDS
    ]
    write_report(write(tmp_path / "runs", *records), tmp_path / "report", title="t")
    (path,) = (tmp_path / "report/tables").glob("*l-infinity*.csv")
    rows = list(csv.DictReader(path.open()))
    assert [(row["trained at"], row["paper"]) for row in rows] == [("L2:0", "75.02"), ("Linf:4/255", "90.56")]


def test_subsets_are_recognised_and_other_data_sets_are_not() -> None:
    cifar10 = paper_transfer("cifar10", "resnet18", "linear_probe")
    assert cifar10 is not None
    assert cifar10.means[3.0] == 91.59
    assert paper_transfer("CIFAR10_small", "resnet18", "linear_probe") == cifar10
    cifar100 = paper_transfer("cifar100", "resnet18", "linear_probe")
    assert cifar100 is not None
    assert cifar100.means[3.0] == 73.91
    reduced = paper_transfer("cifar10", "resnet18", "linear_probe", downscale=32)
    assert reduced is not None
    assert reduced.means[3.0] == 91.64
    assert paper_transfer("my_cifar10", "resnet18", "linear_probe") is None
    assert paper_transfer("cifar10", "resnet34", "linear_probe") is None
    assert paper_transfer("cifar10", "resnet18", "linear_probe", downscale=16) is None


def test_why_the_paper_does_not_compare() -> None:
    ours = trial("x", "resnet18", "L2:0", "caltech101_mini", 0, 50.0, images_per_class=0)
    said = "; ".join(differences_to_paper_transfer(ours))
    for words in ("100 classes", "caltech101_mini is not", "20 epochs, not 150", "64 px, not 224", "one setting"):
        assert words in said
    ours = trial(
        "x", "resnet18", "L2:0", "pets", 0, 50.0, epochs=150, image_size=224, selection={"on": "test"}, views=0
    )
    ours.backbone["num_classes"] = 1000
    assert differences_to_paper_transfer(ours) == []


# --- Table 1, Figures 2, 3 and 8 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_best_robust_stands_beside_the_standard(report: Path, mode: str) -> None:
    rows = numbers(report, f"best_{mode}")
    assert len(rows) == 2 * len(ARCHS) * 2
    for row in rows:
        arch, dataset = row["arch"], row["dataset"]
        models = EPSILONS[:1] if row["kind"] == "standard" else EPSILONS[1:]
        best = max(models, key=lambda model: fmean(values(arch, model, dataset, mode)))
        assert (row["trained_at"], int(row["candidates"])) == (best, len(models))
        assert_trials(row, values(arch, best, dataset, mode))
        paper = paper_transfer(dataset, arch, mode)
        assert paper is not None
        expected = {e: m for e, m in paper.means.items() if (e == 0) == (row["kind"] == "standard")}
        assert float(row["paper_mean"]) == max(expected.values())
        assert expected[float(row["paper_epsilon"])] == max(expected.values())


def test_table_1_has_the_best_of_all_architectures(report: Path) -> None:
    rows = list(csv.DictReader((report / "tables/fixed-feature_transfer_of_the_best_architectures.csv").open()))
    assert [row["data set"] for row in rows] == ["caltech101_mini", "cifar10"]
    for row in rows:
        for kind, models in (("standard", EPSILONS[:1]), ("best robust", EPSILONS[1:])):
            found = [values(arch, model, row["data set"]) for arch in ARCHS for model in models]
            best = max(found, key=fmean)
            assert [float(row[f"{kind}{end}"]) for end in ("", " min", " max")] == [fmean(best), min(best), max(best)]
            assert row[f"{kind} of"].startswith("WRN-50-2, L2:")
        assert row["trials"] == "3"
    assert [rows[1][f"paper standard{end}"] for end in ("", " of")] == ["81.31", "WRN-50-2, L2:0"]
    assert [rows[1][f"paper best robust{end}"] for end in ("", " of")] == ["95.53", "WRN-50-4, L2:3"]
    text = (report / "tables/fixed-feature_transfer_of_the_best_architectures.md").read_text()
    assert "| 81.3 WRN-50-2, L2:0 | 95.5 WRN-50-4, L2:3 |" in text


def test_texture_trained_backbones_stand_in_figure_8_alone(report: Path) -> None:
    rows = numbers(report, "texture_linear_probe")
    assert [(row["dataset"], row["arch"], row["kind"]) for row in rows] == [
        ("cifar10", "resnet18", kind) for kind in ("standard", "robust", "stylized")
    ]
    assert_trials(rows[2], [99.0, 99.1, 99.2])
    assert (rows[2]["backbone"], rows[2]["paper_mean"]) == (f"texture, {STAND_IN}", "")
    assert not (report / "figures/transfer_texture_full_network.csv").exists()
    for path in (report / "figures").glob("transfer_*_linear_probe.csv"):
        if path.stem != "transfer_texture_linear_probe":
            assert "99.1" not in path.read_text()


def test_a_stand_in_is_called_so_wherever_it_is_named(report: Path) -> None:
    """In every row of every table and figure, and it is no standard backbone to compare with."""
    files = [*report.rglob("tables/*.csv"), *report.rglob("figures/*.csv")]
    named = {path: [line for line in path.read_text().splitlines() if "texture" in line] for path in files}
    named = {path: lines for path, lines in named.items() if lines}
    assert {path.parent.name for path in named} == {"tables", "figures"}
    assert "classifiers" in {path.stem for path in named}
    for path, lines in named.items():
        assert all(STAND_IN in line for line in lines), path
    assert "texture" in (report / "records.jsonl").read_text()
    assert STAND_IN not in (report / "records.jsonl").read_text()
    compared = [line for path, lines in named.items() if "verdict" in path.read_text() for line in lines]
    assert compared
    assert not any("The standard backbone" in line for line in compared)


def ranges(figure: Figure) -> list[tuple[float, float]]:
    """Ends of the vertical error bars in a figure."""
    return [
        (float(segment[0][1]), float(segment[1][1]))
        for axes in figure.axes
        for collection in axes.collections
        if isinstance(collection, LineCollection)
        for segment in collection.get_segments()
    ]


@pytest.mark.parametrize("stem", ["best", "texture", "accuracy", "fixed_epsilon", "width", "downscale"])
def test_error_bars_are_lowest_and_highest_trial(drawn: Drawn, stem: str) -> None:
    figure, rows = drawn[f"transfer_{stem}_linear_probe"]
    expected = sorted((row["min"], row["max"]) for row in rows)
    assert sorted(ranges(figure)) == [pytest.approx(pair) for pair in expected]
    assert any(low < high for low, high in expected)


@pytest.mark.parametrize("stem", ["best", "texture", "accuracy", "fixed_epsilon", "width", "downscale"])
def test_nothing_is_told_by_colour_alone(drawn: Drawn, stem: str) -> None:
    """What has another colour has another marker, too; axes have units, and n stands on the figure or its caption."""
    figure, _ = drawn[f"transfer_{stem}_linear_probe"]
    pairs = {
        (line.get_color(), line.get_marker())
        for axes in figure.axes
        for line in axes.lines
        # Ends of error bars, rings, small circles of trials and the paper's diamonds come in all colours.
        if line.get_marker() in set(MARKERS) - {"D"}
        and line.get_markersize() > 4
        and line.get_markerfacecolor() != "none"
    }
    assert len({marker for _, marker in pairs}) == len({color for color, _ in pairs}) == len(pairs)
    assert figure.get_supylabel() == "accuracy after transfer (0-100), n = 3 trials"
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel() or all(label.get_text() for label in axes.get_xticklabels())


# --- Figure 5 and Table 2 --------------------------------------------------------------------------------------------


def test_source_accuracies_come_from_pretraining_and_r_squared_is_numpys(report: Path) -> None:
    rows = numbers(report, "accuracy_linear_probe")
    for dataset in ("cifar10", "caltech101_mini"):
        for arch, label in zip(ARCHS, ("ResNet-18, ℓ2", "ResNet-50, ℓ2", "WRN-50-2, ℓ2"), strict=True):
            own = [r for r in rows if (r["dataset"], r["whose"], r["series"]) == (dataset, "ours", label)]
            assert [row["point"] for row in own] == ["0", "0.5", "1", "3"]
            for row, model in zip(own, EPSILONS, strict=True):
                assert float(row["source_accuracy"]) == source_accuracy(arch, model)
                assert_trials(row, values(arch, model, dataset))
            x, y = ([float(row[key]) for row in own] for key in ("source_accuracy", "mean"))
            assert float(own[0]["r_squared"]) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
            assert float(own[0]["slope"]) == pytest.approx(np.polyfit(x, y, 1)[0])
    papers = {
        row["point"]: row for row in rows if row["whose"] == "paper: cifar10" and row["series"] == "ResNet-18, ℓ2"
    }
    assert len(papers) == 10
    assert (papers["3"]["source_accuracy"], papers["3"]["mean"]) == ("53.12", "91.59")


def test_at_a_fixed_epsilon_the_points_are_architectures(report: Path) -> None:
    rows = numbers(report, "fixed_epsilon_full_network")
    for model in EPSILONS:
        own = [r for r in rows if (r["dataset"], r["whose"], r["series"]) == ("cifar10", "ours", model)]
        assert [row["point"] for row in own] == ["ResNet-18", "ResNet-50", "WRN-50-2"]
        x = [source_accuracy(arch, model) for arch in ARCHS]
        y = [fmean(values(arch, model, "cifar10", "full_network")) for arch in ARCHS]
        assert [float(row["source_accuracy"]) for row in own] == x
        assert [float(row["mean"]) for row in own] == y
        assert float(own[0]["r_squared"]) == pytest.approx(stats.linregress(x, y).rvalue ** 2)
    fits = list(csv.DictReader((report / "tables/full-network_transfer_lines_through_source_accuracy.csv").open()))
    papers = {row["series"]: (row["n"], f"{float(row['R²']):.2f}") for row in fits if row["whose"] == "paper: cifar10"}
    assert papers.items() >= {("L2:0", ("6", "0.79")), ("L2:3", ("6", "0.97"))}
    assert not [row for row in numbers(report, "fixed_epsilon_linear_probe") if row["whose"] != "ours"]


def test_two_points_get_no_line_and_the_table_says_so(tmp_path: Path) -> None:
    records = [trial(f"r18_{m}", "resnet18", m, "pets", 0, 50.0 + i) for i, m in enumerate(("L2:0", "Linf:4/255"))]
    records += [classifier(f"r18_{m}", "resnet18", m, 40.0 - i) for i, m in enumerate(("L2:0", "Linf:4/255"))]
    pages = transfer_pages(write(tmp_path / "runs", *records), tmp_path)
    (page,) = [page for page in pages if "source accuracy" in page.title]
    ours = [row for row in page.tables[0].cells if row[-1].startswith("ours")]
    assert ours == [["pets", "-", "ResNet-18, ℓ∞", "2", "-", "-", "ours; no line through fewer than 3"]]
    assert "no fit, n = 2" in page.pictures[0].alt
    own = [row for row in numbers_in(tmp_path / "transfer_accuracy_linear_probe.csv") if row["whose"] == "ours"]
    assert [(row["point"], row["r_squared"]) for row in own] == [("0", ""), ("4/255", "")]


def numbers_in(path: Path) -> Rows:
    return list(csv.DictReader(path.open()))


def test_backbones_of_unknown_source_accuracy_are_left_out(tmp_path: Path) -> None:
    records = [trial(f"r18_{m}", "resnet18", m, "cifar10", 0, 50.0) for m in EPSILONS]
    records += [trial("who", "resnet18", None, "cifar10", 0, 99.0)]
    records += [classifier(f"r18_{m}", "resnet18", m, 40.0 - i) for i, m in enumerate(EPSILONS[:3])]
    runs = write(tmp_path / "runs", *records)
    pretrainings = Pretrainings([run for run in runs if run.record.task == "pretrain"])
    (target,) = targets([run for run in runs if run.record.task == "transfer"], pretrainings)
    (series,) = over_epsilons(target)
    assert [text for _, _, text in series.points] == ["0", "0.5", "1"]
    assert over_architectures(target) == []  # one architecture


# --- Figure 6 --------------------------------------------------------------------------------------------------------


def test_width_has_every_architecture_at_every_epsilon(report: Path) -> None:
    rows = numbers(report, "width_linear_probe")
    own = [row for row in rows if row["whose"] == "ours"]
    assert [(row["dataset"], row["trained_at"], row["arch"]) for row in own] == [
        (dataset, model, arch) for dataset in ("caltech101_mini", "cifar10") for model in EPSILONS for arch in ARCHS
    ]
    for row in own:
        assert_trials(row, values(row["arch"], row["trained_at"], row["dataset"]))
    papers = {(row["trained_at"], row["arch"]): row["mean"] for row in rows if row["whose"] == "paper: cifar10"}
    assert papers["L2:3", "wide_resnet50_4"] == "95.53"
    assert papers["L2:0", "resnet18"] == "75.91"


# --- Figure 7 --------------------------------------------------------------------------------------------------------


def test_the_best_epsilon_of_original_and_reduced_images(report: Path) -> None:
    rows = numbers(report, "downscale_linear_probe")
    assert {row["dataset"] for row in rows} == {"caltech101_mini"}  # the other was not reduced
    own = [row for row in rows if row["whose"] == "ours"]
    assert len(own) == 2 * len(ARCHS) * len(EPSILONS)
    for row in own:
        model = str(ThreatModel("L2", float(row["epsilon"])))
        downscale = 32 if row["images"] == "reduced to 32 px" else 0
        assert_trials(row, values(row["arch"], model, "caltech101_mini", downscale=downscale))
        best = max(EPSILONS, key=lambda m: fmean(values(row["arch"], m, "caltech101_mini", downscale=downscale)))
        assert row["is_best"] == str(model == best)
    table = numbers_in(report / "tables/fixed-feature_transfer_best_epsilon.csv")
    ours = {(row["architecture"], row["images"]): row for row in table if row["whose"] == "ours"}
    assert ours["ResNet-18", "images as they are"]["best ε"] == "L2:0"
    assert ours["ResNet-18", "reduced to 32 px"]["best ε"] == "L2:3"
    assert ours["ResNet-18", "reduced to 32 px"]["trials"] == "3"
    papers = {row["images"]: row["best ε"] for row in table if row["whose"] == "paper: caltech101"}
    assert papers == {"images as they are": "L2:0.5", "reduced to 32 px": "L2:3"}  # of WRN-50-2, the last


def test_of_a_curve_the_best_and_what_reaches_it() -> None:
    curve = Curve(((0.0, Trials((1.0, 5.0))), (1.0, Trials((4.0, 6.0))), (2.0, Trials((2.0, 3.9)))))
    assert curve.best == (1.0, Trials((4.0, 6.0)))
    assert curve.rivals == [0.0]  # 5 reaches 4; 3.9 does not


def test_trials_of_several_pretrainings_are_one_point(tmp_path: Path) -> None:
    records = [trial(f"r18_{n}", "resnet18", "L2:0", "cifar10", 0, 50.0 + n) for n in range(2)]
    records += [trial("robust", "resnet18", model, "cifar10", 0, 40.0) for model in ("L2:1", "Linf:4/255")]
    (target,) = targets(write(tmp_path, *records), Pretrainings([]))
    found = curves(target, "resnet18")
    assert found.keys() == {"L2", "Linf"}
    assert found["L2"].points == ((0.0, Trials((50.0, 51.0))), (1.0, Trials((40.0,))))
    assert [epsilon for epsilon, _ in found["Linf"].points] == [0.0, 4 / 255]


def test_only_settings_that_are_the_same_otherwise_are_paired(tmp_path: Path) -> None:
    records = [trial("a", "resnet18", "L2:0", "cifar10", 0, 50.0, views=views) for views in (0, 4)]
    records += [trial("a", "resnet18", "L2:0", "cifar10", 0, 40.0, views=4, downscale=32)]
    runs = write(tmp_path, *records)
    originals = targets([run for run in runs if "downscale" not in run.record.config], Pretrainings([]))
    reduced = targets([run for run in runs if "downscale" in run.record.config], Pretrainings([]))
    ((one, other),) = pairs(originals, reduced)
    assert (one.record.config["views"], one.downscale, other.downscale) == (4, 0, 32)
    assert one.setting == "views 4"


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_has_a_section_for_each(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    text = " ".join(page.text.split())
    for heading in (
        "Fixed-feature transfer: best robust against standard (Table 1, Figure 2)",
        "Full-network transfer: best robust against standard (Table 1, Figure 3)",
        "Fixed-feature transfer: source accuracy (Figure 5, Table 2)",
        "Full-network transfer: width (Figure 6)",
        "Fixed-feature transfer: images reduced and enlarged again (Figure 7)",
        "Fixed-feature transfer: standard, robust and amplitude-mixed (stand-in for Stylized ImageNet) (Figure 8)",
    ):
        assert text.count(heading) == 2  # in the contents, too
    assert "Full-network transfer: standard, robust and amplitude-mixed" not in text
    assert "n = 3 trials" in text
    assert TRANSFER_SOURCE in text
    assert "They are not of the same data and budget: pre-trained on 100 classes" in text
    alts = [str(image["alt"]) for image in page.all("img")]
    assert len(set(alts)) == len(alts)
    for stem in ("best", "accuracy", "fixed_epsilon", "width", "downscale", "texture"):
        path = report / f"figures/transfer_{stem}_linear_probe"
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.parametrize("models", [["L2:0"], ["L2:1"], [None]])
def test_what_the_records_do_not_hold_is_left_out(tmp_path: Path, models: list[str | None]) -> None:
    records = [trial("a", "resnet18", model, "cifar10", seed, 50.0) for model in models for seed in (0, 1)]
    assert transfer_pages(write(tmp_path / "runs", *records), tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()
    assert transfer_pages([], tmp_path / "figures") == []
