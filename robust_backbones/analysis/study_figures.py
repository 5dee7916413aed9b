"""Figures of an experiment: a metric against epsilon, training curves, and each class against the standard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_backbones.analysis.experiments import BackboneRuns, Experiment, metric_name, networks
from robust_backbones.analysis.figures import (
    COLORS,
    MARKERS,
    MOST_CURVES,
    NAMES,
    STYLES,
    Picture,
    epsilon_axis,
    epsilon_places,
    grouped_bars,
    legend_above,
    number_of,
    save,
)
from robust_backbones.analysis.statistics import Summary, summarize
from robust_backbones.runs.files import refuse_damaged
from robust_backbones.threat_models import ThreatModel

MOST_CLASSES = 30
"""Most classes in a figure: with more, it shows those with the lowest and the highest differences."""
MOST_PANELS = 3
MOST_ROWS = 8
_CELLS = {"P": "clean", "mPC": "corrupted\n(mPC)", "corrupted": "corrupted"}


def study_figures(experiment: Experiment, folder: Path) -> list[Picture]:
    """The figures of an experiment that its records can fill, written to ``folder``."""
    drawn: list[Picture | None] = []
    is_robustness = experiment.task == "detector_robustness"
    if is_robustness:
        for kind in dict.fromkeys("/".join(metric.split("/")[-2:]) for metric in experiment.headlines):
            drawn.append(condition_figure(experiment, kind, folder / f"{experiment.slug}_{kind.replace('/', '_')}"))
    for metric in () if is_robustness else experiment.headlines:
        stem = f"{experiment.slug}_{metric.replace('/', '_')}"
        drawn.append(epsilon_figure(experiment, metric, folder / f"{stem}_epsilon"))
        drawn.append(training_figure(experiment, metric, folder / f"{stem}_training"))
        if metric.endswith("/AP"):
            drawn.append(class_figure(experiment, metric.removesuffix("/AP"), folder / f"{stem}_classes"))
    if experiment.headlines:
        drawn.append(training_figure(experiment, "total_loss", folder / f"{experiment.slug}_loss"))
    return [picture for picture in drawn if picture is not None]


def condition_figure(experiment: Experiment, kind: str, path: Path) -> Picture | None:
    """A detector's result (``bbox/AP``) on clean and corrupted images and under each attack, one bar per backbone.

    With more than MOST_CURVES backbones, it shows the first ones; the CSV has all.
    """
    metrics = [m for m in experiment.headlines if m.endswith(f"/{kind}") and not m.startswith("rPC/")]
    heads = {
        metric: _CELLS.get(cell := metric.split("/")[0], cell.replace("attack-", "attack:\n")) for metric in metrics
    }
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[float]] = {}
    reach: dict[str, list[tuple[float, float]]] = {}
    for backbone in experiment.backbones:
        found = [backbone.summary(metric) for metric in metrics]
        shown = [one for one in found if one is not None]
        names = {"backbone": backbone.name, "trained_at": backbone.trained_at}
        rows += [{"condition": m, **names, **asdict(one)} for m, one in zip(metrics, found, strict=True) if one]
        if shown and len(groups) < MOST_CURVES:
            label = f"{backbone.label}, n = {max(one.n for one in shown)}"
            groups[label] = [one.mean if one else math.nan for one in found]
            reach[label] = [_reach(one) if one else (math.nan, math.nan) for one in found]
    if not rows:
        return None
    figure = Figure(figsize=(max(5, 2 + 1.3 * len(metrics)), 3.8), layout="constrained")
    axes = figure.subplots()
    grouped_bars(axes, range(len(metrics)), groups, reach)
    axes.set_xticks(range(len(metrics)), heads.values(), fontsize="small")
    axes.set_ylabel(f"{metric_name(kind)} (0-100)")
    legend_above(figure, 2)
    caption = (
        f"{experiment.title}: {metric_name(kind)} on clean and on changed images. Bars: mean over the seeds (n) of "
        "training, with its 95 % t interval where there are two or more."
    )
    points = "; ".join(f"{label}: {', '.join(f'{value:.1f}' for value in values)}" for label, values in groups.items())
    return save(figure, path, rows, caption, f"{metric_name(kind)} by condition ({', '.join(metrics)}): {points}.")


def epsilon_figure(experiment: Experiment, metric: str, path: Path) -> Picture | None:
    """A metric against the epsilon of pre-training, with 95 % intervals and every seed; one panel per norm.

    Each architecture has a colour, marker and line. None if fewer than two backbones have a known epsilon and a value.
    """
    norms = _norms(experiment, metric)
    if not norms:
        return None
    figure = Figure(figsize=(0.8 + 4.2 * len(norms), 3.8), layout="constrained")
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    rows = [
        row
        for panel, norm in zip(panels, norms, strict=True)
        for row in _epsilon_panel(panel, experiment, metric, norm)
    ]
    panels[0].set_ylabel(f"{metric_name(metric)} (0-100), {number_of([row['n'] for row in rows], 'seed')}")
    caption = f"{experiment.title}: {metric_name(metric)} against the ε of pre-training. {_EPSILON_CAPTION}"
    return save(figure, path, rows, caption, f"{metric_name(metric)} against epsilon: {_points(rows)}.")


def figure_4(found: Sequence[Experiment], path: Path) -> Picture | None:
    """Box and mask AP of all detectors against the epsilon of pre-training, as in figure 4 of Salman et al. 2020.

    One panel per metric and norm; None with fewer than two metrics.
    """
    shown = [
        (experiment, metric)
        for experiment in found
        if experiment.task in ("detection", "segmentation")
        for metric in experiment.headlines
        if _norms(experiment, metric)
    ][:MOST_ROWS]
    if len(shown) < 2:
        return None
    most = max(len(_norms(*one)) for one in shown)
    figure = Figure(figsize=(0.8 + 4.2 * most, 3.6 * len(shown)), layout="constrained")
    rows, words = list[dict[str, Any]](), list[str]()
    for (experiment, metric), panels in zip(shown, figure.subplots(len(shown), most, squeeze=False), strict=True):
        norms, own = _norms(experiment, metric), list[dict[str, Any]]()
        for panel, norm in zip(panels, norms, strict=False):
            own += _epsilon_panel(panel, experiment, metric, norm)
            panel.set_title(experiment.title, fontsize="medium", wrap=True)
        for panel in panels[len(norms) :]:
            panel.set_axis_off()
        panels[0].set_ylabel(f"{metric_name(metric)} (0-100), {number_of([row['n'] for row in own], 'seed')}")
        rows += [{"experiment": experiment.title, "metric": metric, **row} for row in own]
        words.append(f"{experiment.title}, {metric_name(metric)}: {_points(own)}")
    caption = f"AP of detectors against the ε of pre-training, as figure 4 of Salman et al. 2020. {_EPSILON_CAPTION}"
    return save(figure, path, rows, caption, f"{'; '.join(words)}.")


_EPSILON_CAPTION = (
    "Filled markers and bars: mean and 95 % t interval over seeds; circles beside them: the seeds. At ε = 0 stands the "
    "standard backbone; the axis of ε is logarithmic, with 0 put beside it."
)


def _on_epsilon_axis(experiment: Experiment, metric: str) -> list[tuple[BackboneRuns, ThreatModel, Summary]]:
    return [
        (backbone, backbone.threat_model, summary)
        for backbone in experiment.backbones
        if backbone.threat_model and (summary := backbone.summary(metric))
        if backbone.is_standard or backbone.threat_model.epsilon  # texture-trained ones have no place on this axis
    ]


def _norms(experiment: Experiment, metric: str) -> list[str]:
    """The norms with a panel: none without two backbones to compare."""
    shown = _on_epsilon_axis(experiment, metric)
    return (sorted({model.norm for _, model, _ in shown if model.epsilon}) or ["L2"]) if len(shown) > 1 else []


def _epsilon_panel(panel: Axes, experiment: Experiment, metric: str, norm: str) -> list[dict[str, Any]]:
    """Draw the backbones of a norm, and the standard ones; returns their rows."""
    shown = _on_epsilon_axis(experiment, metric)
    families = networks(backbone.family for backbone, *_ in shown)
    own = [one for one in shown if one[0].is_standard or one[1].norm == norm]
    epsilons = [model.epsilon for _, model, _ in own]
    places = dict(sorted(zip(epsilons, epsilon_places(epsilons), strict=True)))
    epsilon_axis(panel, norm, places)
    aside = 0.03 * (max(places.values()) - min(places.values()) or 1)
    rows = []
    for index, (family, network) in enumerate(families.items()):
        members = [one for one in own if one[0].family == family]
        if not members:
            continue
        color, marker, line = STYLES[(index + 1) % MOST_CURVES]
        xs = [places[model.epsilon] + aside * (index - (len(families) - 1) / 2) for _, model, _ in members]
        reach = [*zip(*(_reach(summary) for *_, summary in members), strict=True)]
        options: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "capsize": 4}
        label = NAMES.get(network, network)
        means = [summary.mean for *_, summary in members]
        panel.errorbar(xs, means, reach, markersize=6, linewidth=1, label=label, **options)
        for x, (backbone, model, summary) in zip(xs, members, strict=True):
            seeds = list(backbone.values(metric).values())
            at = [x + aside / len(families)] * len(seeds)
            panel.plot(at, seeds, "o", color=color, markerfacecolor="none", markersize=4)
            names = {"norm": norm, "backbone": backbone.name, "trained_at": backbone.trained_at}
            rows.append({**names, "epsilon": model.epsilon, **asdict(summary)})
    if len(families) > 1:
        panel.legend(fontsize="small")
    return rows


def _points(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each backbone's mean and interval, once."""
    told = {(row["backbone"], row["trained_at"]): Summary(*(row[f.name] for f in fields(Summary))) for row in rows}
    return "; ".join(f"{name} at {trained_at} {_in_words(one)}" for (name, trained_at), one in told.items())


def training_figure(experiment: Experiment, metric: str, path: Path) -> Picture | None:
    """A scalar of metrics.json against iterations: mean over the seeds of a backbone, and their range as a band.

    With more than MOST_CURVES backbones it shows the standard ones and those with the highest results; the CSV has all.
    None if no backbone's runs have it at two common iterations.
    """
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    rows, curves_in_words = [], []
    headline = experiment.headlines[0]
    ranked = sorted(experiment.backbones, key=lambda backbone: (not backbone.is_standard, -_mean(backbone, headline)))
    for index, backbone in enumerate(ranked):
        curves = [curve for run in backbone.runs.values() if (curve := read_curve(run.folder, metric))]
        common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if len(common) < 2:
            continue
        means, lows, highs = (
            [reduce([curve[step] for curve in curves]) for step in common] for reduce in (fmean, min, max)
        )
        rows += [
            {"backbone": backbone.name, "trained_at": backbone.trained_at, "n": len(curves)}
            | {"iteration": step, "mean": mean, "min": low, "max": high}
            for step, mean, low, high in zip(common, means, lows, highs, strict=True)
        ]
        if index >= MOST_CURVES:
            continue
        color, marker, line = STYLES[index]
        label = f"{backbone.name} {backbone.trained_at}, n = {len(curves)}"
        every = max(1, len(common) // 8)
        start = index * every // MOST_CURVES  # curves that lie on each other show all their markers
        axes.plot(common, means, linestyle=line, marker=marker, markevery=(start, every), color=color, label=label)
        axes.fill_between(common, lows, highs, color=color, alpha=0.15, linewidth=0)
        curves_in_words.append(f"{backbone.name} at {backbone.trained_at} from {means[0]:.2f} to {means[-1]:.2f}")
    if not rows:
        return None
    name = "total loss" if metric == "total_loss" else f"{metric_name(metric)} (0-100)"
    axes.set(xlabel="iterations", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    caption = f"{experiment.title}: {name} in training. Lines: mean over the seeds; bands: their range."
    if len(ranked) > MOST_CURVES:
        caption += f" Of {len(ranked)} backbones, the standard one and those with the highest {metric_name(headline)}."
    return save(figure, path, rows, caption, f"{name} against iterations: {'; '.join(curves_in_words)}.")


def class_figure(experiment: Experiment, task: str, path: Path) -> Picture | None:
    """Each class's AP with a robust backbone minus that with the standard one, with 95 % intervals over paired seeds.

    One panel per backbone, for the MOST_PANELS with the highest mean AP; the CSV has all. None without per-class
    results of both.

    Args:
        task: ``bbox`` or ``segm``, preceded by the test set's name if a run has several.
    """
    prefix, metric = f"{task}/AP-", metric_name(f"{task}/AP")
    names = sorted({n for run in experiment.runs for n in run.record.metrics if n.startswith(prefix)})
    found: list[tuple[BackboneRuns, dict[str, Summary]]] = []
    for backbone in experiment.robust:
        of_class = {}
        standard = experiment.reference(backbone)
        for name in names if standard else ():
            own, base = backbone.values(name), standard.values(name) if standard else {}
            if differences := [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]:
                of_class[name.removeprefix(prefix)] = summarize(differences, bounds=(-100, 100))
        if of_class:
            found.append((backbone, of_class))
    if not found or len(names) < 2:
        return None
    rows = []
    for backbone, of_class in found:
        for name, summary in of_class.items():
            numbers = asdict(summary)
            row = {"backbone": backbone.name, "trained_at": backbone.trained_at, "class": name, "n": numbers.pop("n")}
            rows.append({**row, "difference": numbers.pop("mean"), **numbers})
    best = sorted(found, key=lambda one: -_mean(one[0], f"{task}/AP"))[:MOST_PANELS]
    of_best = best[0][1]
    classes = sorted(of_best, key=lambda name: of_best[name].mean)
    if len(classes) > MOST_CLASSES:
        classes = classes[: MOST_CLASSES // 2] + classes[-MOST_CLASSES // 2 :]
    figure = Figure(figsize=(1.8 + 2.2 * len(best), 1.3 + 0.24 * len(classes)), layout="constrained")
    panels = figure.subplots(1, len(best), sharey=True, sharex=True, squeeze=False)[0]
    counts = []
    for panel, (backbone, of_class) in zip(panels, best, strict=True):
        shown = [(place, of_class[name]) for place, name in enumerate(classes) if name in of_class]
        for place, summary in shown:
            if summary.low is not None and summary.high is not None:
                panel.plot([summary.low, summary.high], [place, place], color=COLORS[1], linewidth=1.6)
        panel.plot([s.mean for _, s in shown], [place for place, _ in shown], MARKERS[1], color=COLORS[1], markersize=5)
        if len(classes) < len(of_best):  # the middle is left out
            panel.axhline(MOST_CLASSES // 2 - 0.5, color=COLORS[0], linewidth=1, linestyle=":")
        panel.axvline(0, color=COLORS[0], linewidth=1)
        panel.grid(alpha=0.3)
        panel.set_title(f"{backbone.trained_at}, n = {max(s.n for _, s in shown)}", fontsize="medium")
        above = sum(summary.low is not None and summary.low > 0 for summary in of_class.values())
        below = sum(summary.high is not None and summary.high < 0 for summary in of_class.values())
        counts.append(f"at {backbone.trained_at} {above} of {len(of_class)} intervals lie above 0 and {below} below")
    panels[0].set_yticks(range(len(classes)), classes)
    panels[0].set_ylim(-0.7, len(classes) - 0.3)
    figure.supxlabel(f"difference of {metric} to standard (points)", fontsize="medium")
    caption = (
        f"{experiment.title}: {metric} of each class, robust minus standard backbone. Squares and bars: mean and 95 % "
        "t interval of the paired differences over seeds, not corrected for the number of classes: were no class "
        "different, each would still miss 0 with a chance of one in twenty."
    )
    if len(found) > len(best):
        caption += f" Shown are the {len(best)} backbones with the highest mean AP of {len(found)}."
    if len(classes) < len(of_best):
        caption += f" Shown are {len(classes)} of {len(of_best)} classes, from both ends."
    return save(figure, path, rows, caption, f"AP differences of {len(names)} classes: {'; '.join(counts)}.")


def read_curve(folder: Path, metric: str) -> dict[int, float]:
    """A scalar of a run's metrics.json by iteration; empty if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "metrics.json"
    lines = path.read_text().splitlines() if path.exists() else []
    with refuse_damaged(path, "remove it, and the report has no curve of that run"):
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last one off
        return {row["iteration"]: row[metric] for row in rows if metric in row}


def _mean(backbone: BackboneRuns, metric: str) -> float:
    return fmean(backbone.values(metric).values() or [0.0])


def _reach(summary: Summary) -> tuple[float, float]:
    """The extent of its interval below and above the mean."""
    if summary.low is None or summary.high is None:
        return math.nan, math.nan
    return summary.mean - summary.low, summary.high - summary.mean


def _in_words(summary: Summary) -> str:
    if summary.low is None or summary.high is None:
        return f"{summary.mean:.2f} (one seed)"
    return f"{summary.mean:.2f} (interval {summary.low:.2f} to {summary.high:.2f})"
