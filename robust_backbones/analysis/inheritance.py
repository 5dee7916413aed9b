"""Tables and figures of the inheritance protocol: RI and mRI, accuracy changes, distance against forgetting."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import scipy
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from robust_backbones.analysis.experiments import BackboneRuns, Experiment, setting_names
from robust_backbones.analysis.figures import COLORS, MARKERS, Page, Picture, save
from robust_backbones.analysis.records import RecordedRun
from robust_backbones.analysis.results import Answer, conclude
from robust_backbones.analysis.statistics import Comparison, compare_pairs
from robust_backbones.analysis.tables import Table
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.inheritance.config import DISTANCE_NAMES, PRETRAINING
from robust_backbones.transfer.inheritance.matrix import Matrix, matrices_of, setting

MOST_EXACT = 8


@dataclass(frozen=True)
class Correlation:
    """Correlation of ``n`` pairs (distance to pre-training, accuracy lost on it); no coefficients below 3 pairs."""

    n: int
    r: float | None = None
    """Pearson's, with the ends of its 95 % interval by Fisher's transformation (1921)."""
    low: float | None = None
    high: float | None = None
    spearman: float | None = None
    spearman_p: float | None = None
    """Two-sided: exact over all permutations for up to MOST_EXACT pairs, by Student's t for more."""
    distance: str = ""
    """One of ``DISTANCE_NAMES``."""

    @property
    def r_squared(self) -> float | None:
        """The share of the variance of losses explained by a line through the distances."""
        return None if self.r is None else self.r**2


def summary_table(matrices: Sequence[Matrix]) -> Table:
    """One row per backbone and method: mRI, RI of each set, gain on the own set, change on pre-training.

    Values are means over seeds in points of accuracy, mRI with its standard deviation over seeds. A row without
    fine-tuning on all sets has no mRI.
    """
    sets = _common_sets(matrices)
    rows = []
    for (label, method), group in _by_method(matrices).items():
        overall = [value for one in group if (value := one.mean_robustness_improvement) is not None]
        row = {"backbone": label, "method": method, "seeds": len(group)}
        row["mRI"] = fmean(overall) if len(overall) == len(group) else None
        row["mRI std"] = stdev(overall) if len(overall) > 1 else None
        for name in sets:
            row[f"RI {name}"] = _mean(one.robustness_improvement(name) for one in group if name in one.after)
        row["own set"] = fmean(fmean(one.change(name, name) for name in one.after) for one in group)
        row["pre-training"] = fmean(fmean(one.change(name, PRETRAINING) for name in one.after) for one in group)
        rows.append(row)
    columns: dict[str, str | Sequence[str]] = dict.fromkeys(("backbone", "method", "seeds"), ":")
    columns |= {"mRI": ("{mRI:+.2f} ± {mRI std:.2f}", "{mRI:+.2f}")}
    columns |= dict.fromkeys((*(f"RI {name}" for name in sets), "own set", "pre-training"), ":+.2f")
    return Table("Robustness improvement (points of accuracy)", rows, columns)


def accuracy_table(matrices: Sequence[Matrix]) -> Table:
    """Every accuracy: one row per backbone, method, seed, set fine-tuned on and set evaluated on."""
    rows = [
        {"backbone": one.label, "method": one.method, "seed": one.seed, "fine_tuned_on": target, "evaluated_on": name}
        | {"before": one.before[name], "after": after, "change": one.change(target, name)}
        for one in matrices
        for target, row in sorted(one.after.items())
        for name, after in sorted(row.items())
    ]
    return Table("Accuracies", rows, {name: ":" for row in rows for name in row})


def correlations(matrices: Sequence[Matrix]) -> dict[tuple[str, str], Correlation]:
    """Correlations of distance and loss over the sets, for each backbone and method, and over all methods (``all``).

    A set is one pair: its losses are averaged over seeds, and for ``all`` over methods too, because pairs that share a
    distance are not independent.
    """
    found: dict[tuple[str, str], Correlation] = {}
    for label in dict.fromkeys(one.label for one in matrices):
        of_label = [one for one in matrices if one.label == label]
        groups = {method: group for (_, method), group in _by_method(of_label).items()}
        for method, group in [*groups.items(), ("all", of_label)]:
            points = loss_points(group)
            if points:
                found[label, method] = replace(correlate(list(points.values())), distance=_distance(group))
    return found


def loss_points(matrices: Sequence[Matrix]) -> dict[str, tuple[float, float]]:
    """Set -> its distance to pre-training, and the mean points of accuracy lost there by fine-tuning on it."""
    points = {}
    for name in _common_sets(matrices):
        losses = [-one.change(name, PRETRAINING) for one in matrices if name in one.after]
        distances = [one.distances[name] for one in matrices if name in one.distances]
        if losses and distances:
            points[name] = (distances[0], fmean(losses))
    return points


def correlate(points: Sequence[tuple[float, float]]) -> Correlation:
    """Pearson's and Spearman's coefficients of pairs (x, y)."""
    n = len(points)
    x, y = zip(*points, strict=True) if points else ((), ())
    if n < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation(n)
    pearson, spearman = scipy.stats.pearsonr(x, y), scipy.stats.spearmanr(x, y)
    interval = pearson.confidence_interval(0.95)
    low, high = (None, None) if n == 3 else (float(interval.low), float(interval.high))
    p = permutation_p(x, y) if n <= MOST_EXACT else float(spearman.pvalue)
    return Correlation(n, float(pearson.statistic), low, high, float(spearman.statistic), p)


def permutation_p(x: Sequence[float], y: Sequence[float]) -> float:
    """The share of all n! orders of y whose rank correlation with x is at least as far from 0 as this one's."""
    a, b = scipy.stats.rankdata(x), scipy.stats.rankdata(y)
    a = a - a.mean()
    products = np.array(list(permutations(b))) @ a  # proportional to Spearman's coefficients
    return float((np.abs(products) >= abs(a @ b) - 1e-9).mean())


def correlation_table(found: Mapping[tuple[str, str], Correlation]) -> Table:
    """A row a backbone and method."""
    rows = [
        {"backbone": label, "method": method, "distance": one.distance, "sets": one.n, "R²": one.r_squared, "r": one.r}
        | {"low": one.low, "high": one.high, "Spearman": one.spearman, "p": one.spearman_p}
        for (label, method), one in found.items()
    ]
    columns: dict[str, str | Sequence[str]] = {
        **dict.fromkeys(("backbone", "method", "distance", "sets"), ":"),
        "R²": ":.2f",
    }
    columns |= {"r (95 % interval)": ("{r:.2f} ({low:.2f} to {high:.2f})", "{r:.2f}"), "Spearman": ":.2f", "p": ":.2f"}
    return Table("Distance to pre-training against loss on it", rows, columns)


def change_figure(matrices: Sequence[Matrix], path: Path) -> Picture:
    """One heat map per method of one backbone: change of accuracy on each set after fine-tuning on each.

    Cells have the mean over seeds in points; the set's own cell is framed, and pre-training is last.
    """
    sets = _common_sets(matrices)
    groups = _by_method(matrices)
    if len({label for label, _ in groups}) != 1:
        raise InputError("a figure of accuracy changes is of one backbone: give its matrices alone")
    columns = [*sets, PRETRAINING]
    maps = {
        method: [
            [_mean(one.change(target, name) for one in group if target in one.after) for name in columns]
            for target in sets
        ]
        for (_, method), group in groups.items()
    }
    largest = max((abs(v) for rows in maps.values() for row in rows for v in row if v is not None), default=1) or 1
    across = min(len(maps), 2)
    down = math.ceil(len(maps) / across)
    cell = 0.62
    size = (across * (cell * len(columns) + 1.2) + 1, down * (cell * 0.7 * len(sets) + 1.5))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for panel, (method, rows) in zip(panels, maps.items(), strict=False):
        image = panel.imshow(np.array(rows, float), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value is not None:  # cells that have not run are blank
                    color = "white" if abs(value) > 0.6 * largest else "black"
                    panel.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize="x-small", color=color)
            panel.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=COLORS[0], linewidth=1.5))
        panel.axvline(len(sets) - 0.5, color=COLORS[0], linewidth=1.5)
        panel.set_title(method, fontsize="medium")
        panel.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize="small")
        panel.set_yticks(range(len(sets)), sets, fontsize="small")
    for panel in panels[len(maps) :]:
        panel.set_axis_off()
    figure.supylabel("fine-tuned on", fontsize="medium")
    figure.supxlabel("evaluated on", fontsize="medium")
    figure.colorbar(image, ax=list(panels), label=f"change of accuracy (points), {_seeds(matrices)}", shrink=0.8)
    cells = [
        {"method": method, "fine_tuned_on": target, "evaluated_on": name, "change": value}
        for method, rows in maps.items()
        for target, row in zip(sets, rows, strict=True)
        for name, value in zip(columns, row, strict=True)
    ]
    caption = (
        f"Change of accuracy by fine-tuning on one set (row) and evaluation on another (column), {_seeds(matrices)}; a "
        "frame marks the set's own cell, and the last column is the validation set of pre-training."
    )
    return save(figure, path, cells, caption, f"{len(maps)} heat maps of {len(sets)} x {len(columns)} changes.")


def distance_figure(matrices: Sequence[Matrix], path: Path) -> Picture:
    """Accuracy lost on pre-training against the distance to it, one point per set and one marker per method.

    Raises:
        InputError: no distances were measured, or different ones.
    """
    groups, distance = _by_method(matrices), _distance(matrices)
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    named: dict[str, float] = {}
    cells: list[dict[str, object]] = []
    for (label, method), group in groups.items():
        points = loss_points(group)
        if not points:
            raise InputError(f"{label} has no distances: run it without --distance-images 0")
        one, index = correlate(list(points.values())), list(groups).index((label, method))
        color = COLORS[(index + index // len(COLORS)) % len(COLORS)]  # another pair each, also beyond seven methods
        face = "none" if index >= len(MARKERS) else color
        fit = "" if one.r_squared is None else f", R² = {one.r_squared:.2f}"
        x, y = zip(*points.values(), strict=True)
        axes.plot(
            x, y, MARKERS[index % len(MARKERS)], color=color, markersize=5, mfc=face, label=f"{label}, {method}{fit}"
        )
        cells += [
            {"backbone": label, "method": method, "set": name, "distance": distance}
            | {"value": value, "accuracy_lost": loss}
            for name, (value, loss) in points.items()
        ]
        named |= {name: value for name, (value, _) in points.items()}
    axes.axhline(0, color=COLORS[0], linewidth=0.8)
    for name, value in named.items():
        axes.axvline(value, color=COLORS[0], linewidth=0.5, linestyle=":")
        axes.text(value, 1, name, transform=axes.get_xaxis_transform(), rotation=45, fontsize="small")
    axes.set_xlabel(f"{DISTANCE_NAMES[distance]} to pre-training (feature units)")
    axes.set_ylabel(f"accuracy lost on pre-training (points),\n{_seeds(matrices)}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    caption = (
        f"Accuracy lost on pre-training by fine-tuning on a set, over the {DISTANCE_NAMES[distance]} of the set's "
        f"features to those of pre-training, {_seeds(matrices)}. R² of {len(named)} points a method says little."
    )
    return save(figure, path, cells, caption, f"{len(cells)} points: loss over distance.")


def inheritance_pages(runs: Sequence[RecordedRun], folder: Path) -> list[tuple[Answer, Page]]:
    """Answer and section for the ``inheritance`` records of each setting and group of sets; figures go to ``folder``.

    Raises:
        InputError: two records of one cell have different results.
    """
    by_setting: dict[str, dict[str, dict[str, RunRecord]]] = {}
    for run in runs:
        if run.record.task == "inheritance":
            by_label = by_setting.setdefault(json.dumps(setting(run.record), sort_keys=True), {})
            by_label.setdefault(str(run.record.backbone.get("label")), {})[run.place] = run.record
    parts = []
    names = setting_names([json.loads(own) for own in by_setting])
    for name, by_label in zip(names, by_setting.values(), strict=True):
        matrices = [one for label, own in by_label.items() for one in matrices_of(label, own)]
        backbones = [_backbone(label, [*own.values()]) for label, own in by_label.items()]
        for sets in dict.fromkeys(one.sets for one in matrices):
            title = f"Inheritance of robustness ({', '.join(filter(None, [*sets, name]))})"
            parts.append((title, [one for one in matrices if one.sets == sets], backbones))
    pages = []
    for place, (title, own, backbones) in enumerate(parts):
        stem = f"inheritance{f'_{place}' if place else ''}"
        pictures = []
        for label in dict.fromkeys(one.label for one in own):
            of_label = [one for one in own if one.label == label]
            picture = change_figure(of_label, folder / f"{stem}_{label}_changes")
            pictures.append(replace(picture, caption=f"{label}: {picture.caption}", alt=f"{label}: {picture.alt}"))
        if all(one.distances for one in own) and len({one.distance for one in own}) == 1:
            pictures.append(distance_figure(own, folder / f"{stem}_distances"))
        tables = [summary_table(own)]
        if found := correlations(own):
            tables.append(correlation_table(found))
        if place:  # another file for each
            tables = [replace(table, title=f"{table.title} {place + 1}") for table in tables]
        pages.append((_answer(own, backbones), Page(title, pictures, tables)))
    return pages


def _backbone(label: str, records: Sequence[RunRecord]) -> BackboneRuns:
    model = records[0].threat_model
    runs = {record.seed: RecordedRun(Path(record.run_id), record) for record in records}
    return BackboneRuns(label, None if model is None else ThreatModel.parse(model), runs)


def _answer(matrices: Sequence[Matrix], backbones: Sequence[BackboneRuns]) -> Answer:
    """Each robust backbone against the one standard backbone of its architecture and pre-training, method by method."""
    within = Experiment("inheritance", "", "", tuple(backbones), ())
    references = {one.name: within.reference(one) for one in within.robust}
    seeds: dict[str, dict[str, dict[int, float]]] = {}
    for one in matrices:
        if (value := one.mean_robustness_improvement) is not None:
            seeds.setdefault(one.method, {}).setdefault(one.label, {})[one.seed] = value
    pairs = {
        (method, label): (of_method[standard.name], values)
        for method, of_method in seeds.items()
        for label, values in of_method.items()
        if (standard := references.get(label)) and standard.name in of_method
    }
    found = compare_pairs(pairs, bounds=(-200, 200))
    compared: dict[str, list[Comparison | None]] = {
        f"mRI of {method}": [found.get((method, label)) for label in of_method if label in references]
        for method, of_method in seeds.items()
    }
    details = [
        f"{label}, {method}: mRI {fmean(values.values()):+.2f} (n = {len(values)})"
        for method, of_method in seeds.items()
        for label, values in of_method.items()
    ]
    question = "Do robust backbones gain more robustness on other sets when they are fine-tuned on one?"
    return Answer(question, *conclude(compared), details)


def _seeds(matrices: Sequence[Matrix]) -> str:
    n = len({one.seed for one in matrices})
    return f"mean of {n} seeds" if n > 1 else "one seed"


def _by_method(matrices: Sequence[Matrix]) -> dict[tuple[str, str], list[Matrix]]:
    """(backbone, method) -> its seeds."""
    groups: dict[tuple[str, str], list[Matrix]] = {}
    for one in matrices:
        groups.setdefault((one.label, one.method), []).append(one)
    return groups


def _common_sets(matrices: Sequence[Matrix]) -> tuple[str, ...]:
    """The sets of all matrices.

    Raises:
        InputError: they differ, so their mRI cannot be compared.
    """
    kinds = {one.sets for one in matrices}
    if len(kinds) != 1:
        raise InputError("these runs are over different sets, and their mRI do not compare: make a table of each")
    (sets,) = kinds
    return sets


def _distance(matrices: Sequence[Matrix]) -> str:
    """The distance that was measured.

    Raises:
        InputError: they differ.
    """
    kinds = {one.distance for one in matrices if one.distances}
    if len(kinds) > 1:
        raise InputError(f"these runs measured different distances ({', '.join(sorted(kinds))}): make a figure of each")
    return next(iter(kinds), "w2")


def _mean(values: Iterable[float]) -> float | None:
    """The mean; None without values."""
    found = list(values)
    return fmean(found) if found else None
