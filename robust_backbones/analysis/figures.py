"""Figures of a study, each as SVG, PNG and the numbers in it as CSV; they need no colour to be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from robust_backbones.analysis.detection_errors import ERRORS, ORACLES, DetectionErrors
from robust_backbones.analysis.statistics import Summary, summarize
from robust_backbones.analysis.study import Backbone, Experiment, metric_name
from robust_backbones.analysis.tables import csv_text
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path

# Okabe and Ito's palette, told apart by colour-blind eyes, without its yellow, which is too light for lines.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "oo")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MOST_CLASSES = 30
"""A figure shows no more: of more classes, those with the lowest and the highest differences."""
MOST_PANELS = 3
MOST_CURVES = len(MARKERS)


@dataclass(frozen=True)
class Picture:
    """A picture's file (a ``.png`` and a ``.csv`` may stand beside it), and what it says to readers and listeners."""

    file: Path
    caption: str
    alt: str


def epsilon_figure(experiment: Experiment, metric: str, path: Path) -> Picture | None:
    """A metric against the epsilon of pre-training, with 95 % intervals and every seed; a panel a norm.

    Args:
        path: of its files, without their suffixes.

    None where fewer than two backbones have a known epsilon and a value.
    """
    shown = [b for b in experiment.backbones if b.threat_model is not None and b.values(metric)]
    if len(shown) < 2:
        return None
    standards = [backbone for backbone in shown if backbone.is_standard]
    norms = sorted({b.threat_model.norm for b in shown if b.threat_model and not b.is_standard}) or ["L2"]
    figure = Figure(figsize=(0.8 + 4.2 * len(norms), 3.8), layout="constrained")
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    rows, said = [], []
    for panel, norm in zip(panels, norms, strict=True):
        robust = [b for b in shown if b.threat_model and b.threat_model.norm == norm and not b.is_standard]
        unit = 255 if norm == "Linf" else 1
        positions = [_epsilon(backbone) * unit for backbone in standards + robust]
        places = epsilon_places(positions)
        summaries = [summarize(list(backbone.values(metric).values())) for backbone in standards + robust]
        _draw_intervals(panel, places, summaries, standards + robust, metric)
        name = "ℓ∞ ε (in 1/255)" if norm == "Linf" else "ℓ2 ε (pixels in [0, 1])"
        panel.set_xlabel(f"{name} of pre-training")
        ticks = dict(sorted(zip(places, positions, strict=True)))
        panel.xaxis.set_major_locator(FixedLocator(list(ticks)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([f"{epsilon:g}" for epsilon in ticks.values()], rotation=90 if len(ticks) > 6 else 0)
        panel.margins(x=0.1)
        for backbone, summary in zip(standards + robust, summaries, strict=True):
            rows.append([norm, backbone.name, backbone.trained_at, _epsilon(backbone), *_numbers(summary)])
    for backbone in shown:
        said.append(
            f"{backbone.name} at {backbone.trained_at} {_said(summarize(list(backbone.values(metric).values())))}"
        )
    counts = sorted({len(backbone.values(metric)) for backbone in shown})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    panels[0].set_ylabel(f"{metric_name(metric)} (0-100), {n} seed{'s' * (counts[-1] > 1)}")
    heads = ["norm", "backbone", "trained_at", "epsilon", "n", "mean", "std", "low", "high"]
    caption = (
        f"{experiment.title}: {metric_name(metric)} against the ε of pre-training. Squares and bars: mean and 95 % t "
        "interval over seeds; circles beside them: the seeds; dashed line: mean of the standard backbone (ε = 0). The "
        "axis of ε is logarithmic, with 0 put beside it."
    )
    return save(figure, path, heads, rows, caption, f"{metric_name(metric)} against epsilon: {'; '.join(said)}.")


def training_figure(experiment: Experiment, metric: str, path: Path) -> Picture | None:
    """A scalar of metrics.json against iterations: mean over the seeds of a backbone, and their range as a band.

    Of more than MOST_CURVES backbones it shows the standard ones and those with the highest results; the CSV has all.
    None where no backbone's runs have it at two common iterations.
    """
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    rows, said = [], []
    headline = experiment.headlines[0]
    ranked = sorted(experiment.backbones, key=lambda backbone: (not backbone.is_standard, -_mean(backbone, headline)))
    for index, backbone in enumerate(ranked):
        curves = [curve for run in backbone.runs.values() if (curve := read_curve(run.folder, metric))]
        common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if len(common) < 2:
            continue
        means = [fmean(curve[step] for curve in curves) for step in common]
        lows = [min(curve[step] for curve in curves) for step in common]
        highs = [max(curve[step] for curve in curves) for step in common]
        columns = zip(common, means, lows, highs, strict=True)
        rows += [[backbone.name, backbone.trained_at, len(curves), *numbers] for numbers in columns]
        if index >= MOST_CURVES:
            continue
        color, line, marker = COLORS[index], LINES[index], MARKERS[index]
        label = f"{backbone.name} {backbone.trained_at}, n = {len(curves)}"
        every = max(1, len(common) // 8)
        start = index * every // MOST_CURVES  # curves that lie on each other show all their markers
        axes.plot(common, means, linestyle=line, marker=marker, markevery=(start, every), color=color, label=label)
        axes.fill_between(common, lows, highs, color=color, alpha=0.15, linewidth=0)
        said.append(f"{backbone.name} at {backbone.trained_at} goes from {means[0]:.2f} to {means[-1]:.2f}")
    if not rows:
        return None
    name = "total loss" if metric == "total_loss" else f"{metric_name(metric)} (0-100)"
    axes.set(xlabel="iterations", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    heads = ["backbone", "trained_at", "n", "iteration", "mean", "min", "max"]
    caption = f"{experiment.title}: {name} in training. Lines: mean over the seeds; bands: their range."
    if len(ranked) > MOST_CURVES:
        caption += f" Of {len(ranked)} backbones, the standard one and those with the highest {metric_name(headline)}."
    return save(figure, path, heads, rows, caption, f"{name} against iterations: {'; '.join(said)}.")


def class_figure(experiment: Experiment, task: str, path: Path) -> Picture | None:
    """Each class's AP with a robust backbone minus that with the standard one, with 95 % intervals over paired seeds.

    A panel a backbone, for the MOST_PANELS with the highest mean AP; the CSV has all. None without per-class results of
    both.

    Args:
        task: ``bbox`` or ``segm``, behind the test set's name where a run has several.
    """
    standard = experiment.standard
    if standard is None:
        return None
    prefix = f"{task}/AP-"
    names = {n for run in experiment.runs for n in run.record.metrics if n.startswith(prefix)}
    found: dict[int, dict[str, Summary]] = {}
    robust = [b for b in experiment.backbones if b is not standard and not b.is_from_scratch]
    for index, backbone in enumerate(robust):
        of_class: dict[str, Summary] = {}
        for name in sorted(names):
            own, base = backbone.values(name), standard.values(name)
            differences = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
            if differences:
                of_class[name.removeprefix(prefix)] = summarize(differences)
        if of_class:
            found[index] = of_class
    if not found or len(names) < 2:
        return None
    heads = ["backbone", "trained_at", "class", "n", "difference", "std", "low", "high"]
    rows = [
        [robust[i].name, robust[i].trained_at, name, *_numbers(summary)]
        for i, of_class in found.items()
        for name, summary in of_class.items()
    ]
    best = sorted(found, key=lambda i: -_mean(robust[i], f"{task}/AP"))[:MOST_PANELS]
    classes = sorted(found[best[0]], key=lambda name: found[best[0]][name].mean)
    if len(classes) > MOST_CLASSES:
        classes = classes[: MOST_CLASSES // 2] + classes[-MOST_CLASSES // 2 :]
    figure = Figure(figsize=(1.8 + 2.2 * len(best), 1.3 + 0.24 * len(classes)), layout="constrained")
    panels = figure.subplots(1, len(best), sharey=True, sharex=True, squeeze=False)[0]
    said = []
    for panel, i in zip(panels, best, strict=True):
        shown = [(place, found[i][name]) for place, name in enumerate(classes) if name in found[i]]
        for place, summary in shown:
            if summary.low is not None and summary.high is not None:
                panel.plot([summary.low, summary.high], [place, place], color=COLORS[1], linewidth=1.6)
        panel.plot([s.mean for _, s in shown], [place for place, _ in shown], MARKERS[1], color=COLORS[1], markersize=5)
        if len(classes) < len(found[best[0]]):
            panel.axhline(
                MOST_CLASSES // 2 - 0.5, color=COLORS[0], linewidth=1, linestyle=":"
            )  # the middle is left out
        panel.axvline(0, color=COLORS[0], linewidth=1)
        panel.grid(alpha=0.3)
        n = max(summary.n for _, summary in shown)
        panel.set_title(f"{robust[i].trained_at}, n = {n}", fontsize="medium")
        above = sum(summary.low is not None and summary.low > 0 for summary in found[i].values())
        below = sum(summary.high is not None and summary.high < 0 for summary in found[i].values())
        said.append(f"at {robust[i].trained_at} {above} of {len(found[i])} intervals lie above 0 and {below} below")
    panels[0].set_yticks(range(len(classes)), classes)
    panels[0].set_ylim(-0.7, len(classes) - 0.3)
    figure.supxlabel(f"difference of {metric_name(f'{task}/AP')} to standard (points)", fontsize="medium")
    caption = (
        f"{experiment.title}: {metric_name(f'{task}/AP')} of each class, robust minus standard backbone. Squares and "
        "bars: mean and 95 % t interval of the paired differences over seeds, not corrected for the number of classes: "
        "one in twenty misses 0 by chance alone."
    )
    if len(found) > len(best):
        caption += f" Shown are the {len(best)} backbones with the highest mean AP of {len(found)}."
    if len(classes) < len(found[best[0]]):
        caption += f" Shown are {len(classes)} of {len(found[best[0]])} classes, from both ends."
    return save(figure, path, heads, rows, caption, f"AP differences of {len(names)} classes: {'; '.join(said)}.")


def error_figure(errors: Mapping[str, DetectionErrors], title: str, path: Path) -> Picture:
    """The AP50 points lost to each type of error, a bar a condition; not stacked, since they do not add up.

    Args:
        errors: condition -> its errors, the clean one first.
        title: what is evaluated, such as a detector and a test set.
        path: of its files, without their suffixes.

    Raises:
        InputError: there are no conditions, or more than MOST_CURVES.
    """
    if not 0 < len(errors) <= MOST_CURVES:
        raise InputError(f"a figure shows 1 to {MOST_CURVES} conditions, not {len(errors)}: choose those to compare")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    # The last two are no types of error but sums of a kind, and stand apart.
    centers = [place + 0.5 * (name not in ERRORS) for place, name in enumerate(ORACLES)]
    width = 0.84 / len(errors)
    for index, (condition, one) in enumerate(errors.items()):
        places = [center + (index - (len(errors) - 1) / 2) * width for center in centers]
        color = COLORS[index]
        axes.bar(
            places,
            [one.delta_ap[name] for name in ORACLES],
            0.86 * width,
            label=f"{condition}, AP50 {one.ap50:.1f}",
            facecolor="white" if HATCHES[index] else color,
            edgecolor=color,
            hatch=HATCHES[index],
        )
    axes.axvline(len(ERRORS) - 0.25, color=COLORS[0], linewidth=1, linestyle=":")
    axes.set_xticks(centers, [name.replace(" ", "\n") for name in ORACLES], fontsize="small")
    axes.set_ylabel("AP50 points that its repair gives")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    heads = ["condition", "AP50", *(f"{name} {kind}" for kind in ("dAP50", "count") for name in ORACLES)]
    rows = [
        [condition, one.ap50, *(values[name] for values in (one.delta_ap, one.counts) for name in ORACLES)]
        for condition, one in errors.items()
    ]
    caption = (
        f"{title}: what AP50 loses to each type of error (TIDE). Bars: the points that repairing this type alone would "
        "give; they do not add up to the loss. Both: wrong class and wrong place. Right of the dotted line: all wrong "
        "detections removed, and all objects that are not found taken out."
    )
    said = [
        f"{condition}: AP50 {one.ap50:.1f}, " + ", ".join(f"{name} {one.delta_ap[name]:.1f}" for name in ORACLES)
        for condition, one in errors.items()
    ]
    return save(figure, path, heads, rows, caption, f"AP50 points lost to each type of error; {'; '.join(said)}.")


def read_curve(folder: Path, metric: str) -> dict[int, float]:
    """A scalar of a run's metrics.json by iteration; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "metrics.json"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last one off
        return {row["iteration"]: row[metric] for row in rows if metric in row}
    except (ValueError, LookupError):
        raise InputError(f"{path} is damaged: remove it, and the report has no curve of that run") from None


def _draw_intervals(
    axes: Axes, places: Sequence[float], summaries: Sequence[Summary], backbones: Sequence[Backbone], metric: str
) -> None:
    aside = 0.03 * (max(places) - min(places) or 1)
    for place, summary, backbone in zip(places, summaries, backbones, strict=True):
        color = COLORS[0] if backbone.is_standard else COLORS[1]
        half = 0.0 if summary.high is None else summary.high - summary.mean
        axes.errorbar(place, summary.mean, half, fmt=MARKERS[1], color=color, capsize=4, markersize=6)
        values = list(backbone.values(metric).values())
        beside = [place + aside] * len(values)
        axes.plot(beside, values, MARKERS[0], color=color, markerfacecolor="none", markersize=4, linestyle="none")
        if backbone.is_standard:
            axes.axhline(summary.mean, color=color, linewidth=1, linestyle="--")
    axes.grid(alpha=0.3, axis="y")


def epsilon_places(epsilons: Sequence[float]) -> list[float]:
    """Positions on a logarithmic axis, a unit a factor of ten, with 0 half a unit below the smallest above it."""
    smallest = min((epsilon for epsilon in epsilons if epsilon > 0), default=1.0)
    return [math.log10(epsilon / smallest) + 0.5 if epsilon > 0 else 0.0 for epsilon in epsilons]


def _mean(backbone: Backbone, metric: str) -> float:
    return fmean(backbone.values(metric).values() or [0.0])


def _epsilon(backbone: Backbone) -> float:
    return backbone.threat_model.epsilon if backbone.threat_model else 0.0


def _numbers(summary: Summary) -> list[Any]:
    return [summary.n, summary.mean, summary.std, summary.low, summary.high]


def _said(summary: Summary) -> str:
    if summary.low is None or summary.high is None:
        return f"{summary.mean:.2f} (one seed)"
    return f"{summary.mean:.2f} (interval {summary.low:.2f} to {summary.high:.2f})"


def save(
    figure: Figure, path: Path, heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, alt: str
) -> Picture:
    """Write a figure as SVG and PNG, and its numbers as CSV; ``path`` is without suffix, None is an empty cell."""
    # A fixed salt and no date: the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "robust-backbones"}):
        for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
            with atomic_path(path.with_name(path.name + suffix)) as temporary:
                figure.savefig(temporary, format=suffix[1:], **options)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    with atomic_path(path.with_name(path.name + ".csv")) as temporary:
        temporary.write_text(csv_text(heads, cells))
    return Picture(path.with_name(path.name + ".svg"), caption, alt)
