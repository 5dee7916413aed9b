"""Tables and figures of classification transfer, as Salman et al. 2020 have them, for any set of backbones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from robust_backbones.analysis.figures import COLORS, LINES, MARKERS, MOST_CURVES, Picture, epsilon_places, save
from robust_backbones.analysis.paper import (
    TABLE_2,
    TRANSFER_SOURCE,
    PaperTransfer,
    differences_to_paper_transfer,
)
from robust_backbones.analysis.study import Run
from robust_backbones.analysis.transfer_results import (
    NAMES,
    NORMS,
    Curve,
    Pretrainings,
    Series,
    Source,
    Target,
    Trials,
    curves,
    epsilon_text,
    in_order,
    name,
    over_architectures,
    over_epsilons,
    pairs,
    targets,
)
from robust_backbones.checkpoint import zoo
from robust_backbones.models import ARCHITECTURES, ResNetShape
from robust_backbones.threat_models import ThreatModel

T = TypeVar("T")

MODES = {"linear_probe": "Fixed-feature transfer", "full_network": "Full-network transfer"}
BEST = {"standard": "standard", "robust": "best robust"}
TEXTURE = {**BEST, "stylized": "texture-trained"}
"""Kind of a backbone -> what a legend calls it, in the order of colours and markers."""
MOST_COLUMNS = 4
_NUMBERS = ["n", "mean", "min", "max", "trials"]
_LOWEST_TO_HIGHEST = "mean of the trials and their range from the lowest to the highest"
_ACCURACY = "accuracy after transfer (0-100)"


@dataclass(frozen=True)
class Page:
    """One section of a report."""

    title: str
    pictures: tuple[Picture, ...]
    tables: Mapping[str, tuple[list[str], list[list[str]]]]
    """Name -> heads and cells."""


def transfer_pages(runs: Sequence[Run], folder: Path) -> list[Page]:
    """The sections that the records of ``transfer`` can fill; their figures are written to ``folder``.

    Source accuracies are those of the records of ``pretrain`` among ``runs``, and of the published backbones.
    """
    trials = [run for run in runs if run.record.task == "transfer"]
    if not trials:
        return []
    pretrainings = Pretrainings([run for run in runs if run.record.task == "pretrain"])
    pages = []
    for mode in MODES:
        of_mode = [run for run in trials if run.record.config.get("mode") == mode]
        found = targets([run for run in of_mode if not run.record.config.get("downscale")], pretrainings)
        reduced = targets([run for run in of_mode if run.record.config.get("downscale")], pretrainings)
        pages += [
            best_page(mode, found, folder),
            accuracy_page(mode, found, folder),
            width_page(mode, found, folder),
            downscale_page(mode, pairs(found, reduced), folder),
            texture_page(mode, found, folder),
        ]
    return [page for page in pages if page is not None]


def best_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Table 1, and Figure 2 (fixed-feature) or 3 (full-network)."""
    picture = _kinds_figure(mode, found, BEST, ("standard", "robust"), folder / f"transfer_best_{mode}")
    if picture is None:
        return None
    number = list(MODES).index(mode) + 2
    heads = ["data set", "setting", "standard", "best robust", "difference", "trials"]
    heads += ["paper: standard", "paper: best robust", "paper: best trial"]
    rows = [row for target in found if (row := _table_1(target))]
    title = f"{MODES[mode]}: best robust against standard (Table 1, Figure {number})"
    return Page(title, (picture,), {f"{MODES[mode]} of the best architectures": (heads, rows)})


def texture_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Figure 8."""
    picture = _kinds_figure(mode, found, TEXTURE, ("stylized",), folder / f"transfer_texture_{mode}")
    title = f"{MODES[mode]}: standard, robust and texture-trained (Figure 8)"
    return Page(title, (picture,), {}) if picture else None


def _kinds_figure(
    mode: str, found: Sequence[Target], kinds: Mapping[str, str], needed: Sequence[str], path: Path
) -> Picture | None:
    """A panel a data set: of each architecture the best backbone of each kind; two kinds and those needed, or none."""
    panels = []
    for target in found:
        shown: dict[str, dict[str, list[Source]]] = {}
        for arch in target.archs:
            ranked = {kind: sources for kind in kinds if (sources := target.of_kind(arch, kind))}
            if len(ranked) > 1 and set(needed) <= ranked.keys():
                shown[arch] = ranked
        if shown:
            panels.append((target, shown))
    if not panels:
        return None
    figure, axes = _grid(len(panels), width=1.6 + 0.8 * max(len(shown) for _, shown in panels))
    rows: list[list[Any]] = []
    said = []
    for panel, (target, shown) in zip(axes, panels, strict=True):
        for center, (arch, ranked) in enumerate(shown.items()):
            for place, (kind, sources) in enumerate(ranked.items()):
                source, style = sources[0], list(kinds).index(kind)
                x = center + 0.26 * (place - (len(ranked) - 1) / 2)
                _draw_trials(panel, x, source.trials, style)
                if paper := _paper_of_kind(target.paper(arch), kind):
                    panel.plot(x, paper[1], "D", color=COLORS[style], markerfacecolor="white", markersize=5)
                row = [target.dataset, target.setting, arch, kind, source.name, str(source.threat_model), len(sources)]
                rows.append([*row, *_numbers(source.trials), *(paper or (None, None))])
                said.append(f"{target.dataset} {name(arch)} {kinds[kind]} {source.trials}")
        panel.set_xticks(range(len(shown)), [name(arch) for arch in shown], fontsize="small")
        panel.set_xlim(-0.6, len(shown) - 0.4)
        panel.set_title(_title(target), fontsize="small")
        panel.grid(alpha=0.3, axis="y")
    with_paper = any(row[-1] is not None for row in rows)
    entries = [(label, COLORS[i], MARKERS[i], "none") for i, label in enumerate(kinds.values())]
    _legend(figure, axes[0], [*entries, *([("the paper's", COLORS[0], "D", "none")] * with_paper)])
    n = _n([row[7] for row in rows])
    figure.supylabel(f"{_ACCURACY}, {n}", fontsize="small")
    caption = (
        f"{MODES[mode]}: {' against '.join(kinds.values())}, a pair of each architecture. Filled markers and bars: "
        f"{_LOWEST_TO_HIGHEST} ({n}); small circles: the trials. Best is what has the highest mean in this figure, as "
        "in the paper: the best of many looks better than it is."
    ) + _paper_words([target for target, _ in panels], "Hollow diamonds", shown=with_paper)
    heads = ["dataset", "setting", "arch", "kind", "backbone", "trained_at", "candidates", *_NUMBERS]
    heads += ["paper_epsilon", "paper_mean"]
    return save(figure, path, heads, rows, caption, f"{MODES[mode]}: {'; '.join(said)}.")


def _paper_of_kind(paper: PaperTransfer | None, kind: str) -> tuple[float, float] | None:
    """(epsilon, mean) of the paper's standard or best robust backbone; it has no numbers of texture-trained ones."""
    if paper is None or kind == "stylized":
        return None
    means = {epsilon: mean for epsilon, mean in paper.means.items() if (epsilon == 0) == (kind == "standard")}
    return max(means.items(), key=lambda item: item[1])


def _table_1(target: Target) -> list[str] | None:
    """The best of all architectures, and of all of the paper's; None where standard or robust backbones lack."""
    best: dict[str, Source] = {}
    papers: dict[str, str] = {}
    for kind in BEST:
        candidates = [source for arch in target.archs for source in target.of_kind(arch, kind)]
        if not candidates:
            return None
        best[kind] = max(candidates, key=lambda source: source.trials.mean)
        values = [(v[1], v[0], arch) for arch in NAMES if (v := _paper_of_kind(target.paper(arch), kind))]
        papers[kind] = _paper_cell(max(values, default=None))
    trials = [(p.best_trial[1], p.best_trial[0], arch) for arch in NAMES if (p := target.paper(arch)) and p.best_trial]
    ours = [f"{source.trials} {name(source.arch)}, {source.threat_model}" for source in best.values()]
    difference = best["robust"].trials.mean - best["standard"].trials.mean
    counts = dict.fromkeys(str(len(source.trials.values)) for source in best.values())
    row = [target.dataset, target.setting or "-", *ours, f"{difference:+.1f}", " and ".join(counts)]
    return [*row, *papers.values(), _paper_cell(max(trials, default=None))]


def _paper_cell(value: tuple[float, float, str] | None) -> str:
    return f"{value[0]:.1f} {name(value[2])}, L2:{value[1]:g}" if value else "-"


def accuracy_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Figure 5 (over epsilons) and Table 2 (over architectures at a fixed epsilon)."""
    pictures, rows = [], []
    for ours_of, papers_of, stem, over in (
        (over_epsilons, _paper_over_epsilons, "accuracy", "over the ε of pre-training, which stands at the points"),
        (over_architectures, _paper_table_2, "fixed_epsilon", "over architectures, at one ε a series"),
    ):
        drawn = [(target, ours, papers_of(target)) for target in found if (ours := ours_of(target))]
        if drawn:
            pictures.append(_accuracy_figure(mode, drawn, folder / f"transfer_{stem}_{mode}", over))
            rows += _fit_rows(drawn)
    heads = ["data set", "setting", "series", "n", "R²", "slope", "whose"]
    title = f"{MODES[mode]}: source accuracy (Figure 5, Table 2)"
    tables = {f"{MODES[mode]}, lines through source accuracy": (heads, rows)}
    return Page(title, tuple(pictures), tables) if pictures else None


def _fit_rows(drawn: Sequence[tuple[Target, list[Series], list[Series]]]) -> list[list[str]]:
    rows = []
    for target, whose, series in _with_papers(drawn):
        for one in series:
            fit, n = one.fit, len(one.points)
            why = "" if fit else ("; no line through fewer than 3" if n < 3 else "; no line, an axis is constant")
            cells = [f"{fit.r_squared:.2f}", f"{fit.slope:+.2f}"] if fit else ["-", "-"]
            rows.append([target.dataset, target.setting or "-", one.label, str(n), *cells, whose + why])
    return rows


def _paper_over_epsilons(target: Target) -> list[Series]:
    """The paper's accuracies after transfer over the ImageNet accuracies of the published backbones."""
    sources = {(p.arch, p.threat_model): p.imagenet_accuracy for p in zoo.published().values()}
    series = []
    for arch in target.archs:
        if paper := target.paper(arch):
            models = {ThreatModel("L2", epsilon): mean for epsilon, mean in paper.means.items()}
            points = [(sources[arch, m], Trials((mean,)), epsilon_text(m)) for m, mean in models.items()]
            series.append(Series(f"{name(arch)}, {NORMS['L2']}", tuple(points)))
    return series


def _paper_table_2(target: Target) -> list[Series]:
    if (target.mode, target.paper_name) != ("full_network", "cifar10"):
        return []
    return [
        Series(label, tuple((x, Trials((y,)), name(arch)) for arch, (x, y) in values.items()))
        for label, values in TABLE_2.items()
    ]


def _accuracy_figure(
    mode: str, drawn: Sequence[tuple[Target, list[Series], list[Series]]], path: Path, over: str
) -> Picture:
    """A panel a data set, and beside it one of the paper's points, whose axes are others."""
    panels = _with_papers(drawn)
    figure, axes = _grid(len(panels), width=3.7)
    rows, said = [], []
    for panel, (target, whose, series) in zip(axes, panels, strict=True):
        is_ours = whose == "ours"
        for index, one in enumerate(series):
            _draw_series(panel, one, index % MOST_CURVES, hollow=not is_ours)
            fit = [one.fit.slope, one.fit.intercept, one.fit.r_squared] if one.fit else [None] * 3
            for x, trials, text in one.points:
                rows.append([target.dataset, target.setting, whose, one.label, text, x, *_numbers(trials), *fit])
            said.append(f"{target.dataset if is_ours else whose}, {one.label}: {one.fit_text}")
        sources = {source.pretraining.dataset for source in target.sources if source.pretraining}
        panel.set_title(_title(target) if is_ours else whose, fontsize="small")
        panel.set_xlabel(f"accuracy on {' or '.join(sorted(sources)) if is_ours else 'ImageNet'}", fontsize="small")
        panel.legend(fontsize="x-small")
        panel.grid(alpha=0.3)
        _label_points(panel, [point for one in series for point in one.points])
    n = _n([len(trials.values) for _, ours, _ in drawn for one in ours for _, trials, _ in one.points])
    figure.supylabel(f"{_ACCURACY}, {n}", fontsize="small")
    caption = (
        f"{MODES[mode]}: accuracy of the backbone on what it was trained on (0-100) and after transfer, {over}. "
        f"Markers and bars: {_LOWEST_TO_HIGHEST} ({n}). Dotted: the least-squares line through the means, of 3 points "
        "or more; R², the share of variance that it explains, says little of few points (n in the legends). Not all "
        "points are labelled where they crowd."
    ) + _paper_words([target for target, _, _ in drawn], _PANELS, shown=len(panels) > len(drawn))
    heads = ["dataset", "setting", "whose", "series", "point", "source_accuracy", *_NUMBERS]
    heads += ["slope", "intercept", "r_squared"]
    return save(figure, path, heads, rows, caption, f"{MODES[mode]} over source accuracy: {'; '.join(said)}.")


_PANELS = "Hollow markers in panels of their own"


def _draw_series(panel: Axes, series: Series, style: int, *, hollow: bool) -> None:
    color = COLORS[style]
    for x, trials, _ in series.points:
        _draw_range(panel, x, trials, color)
    xs, means = [x for x, _, _ in series.points], [trials.mean for _, trials, _ in series.points]
    panel.plot(
        xs,
        means,
        MARKERS[style],
        color=color,
        markerfacecolor="white" if hollow else color,
        label=f"{series.label}: {series.fit_text}",
    )
    if series.fit:
        ends = [min(xs), max(xs)]
        panel.plot(ends, [series.fit.intercept + series.fit.slope * end for end in ends], ":", color=color)


Widths = dict[ThreatModel, dict[str, Trials]]
"""Trained at -> architecture -> trials."""


def _label_points(panel: Axes, points: Sequence[tuple[float, Trials, str]]) -> None:
    """Texts beside the points, but none that would lie on one before it."""
    panel.margins(x=0.2 if any(len(text) > 5 for *_, text in points) else 0.12, y=0.15)
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    placed: list[tuple[float, float]] = []
    for x, trials, text in points:
        place = (x - left) / (right - left), (trials.mean - bottom) / (top - bottom)
        if all(abs(place[0] - a) > 0.028 * len(text) or abs(place[1] - b) > 0.045 for a, b in placed):
            placed.append(place)
            panel.annotate(text, (x, trials.mean), textcoords="offset points", xytext=(5, 4), fontsize=7)


def width_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Figure 6."""
    drawn: list[tuple[Target, Widths, Widths]] = []
    for target in found:
        ours = {
            model: {arch: trials for arch in target.archs if (trials := target.trials(arch, model))}
            for model in target.threat_models
        }
        ours = {model: line for model, line in ours.items() if len(line) > 1}
        if ours:
            shown = sorted({0.0, 3.0} | {model.epsilon for model in ours if model.norm == "L2"})
            papers = {ThreatModel("L2", epsilon): _paper_widths(target, epsilon) for epsilon in shown}
            papers = {model: line for model, line in papers.items() if len(line) > 1}
            drawn.append((target, ours, papers))
    if not drawn:
        return None
    panels = _with_papers(drawn)
    figure, axes = _grid(len(panels), width=3.4)
    models = sorted({model for _, _, lines in panels for model in lines}, key=lambda model: (model.norm, model.epsilon))
    styles = {model: index % MOST_CURVES for index, model in enumerate(models)}
    rows, said = [], []
    for panel, (target, whose, lines) in zip(axes, panels, strict=True):
        is_ours = whose == "ours"
        archs = in_order({arch for line in lines.values() for arch in line})
        for model, line in lines.items():
            _draw_widths(panel, archs, line, styles[model], hollow=not is_ours)
            for arch, trials in line.items():
                rows.append([target.dataset, target.setting, whose, str(model), arch, *_numbers(trials)])
            means = ", ".join(f"{name(arch)} {trials.mean:.1f}" for arch, trials in line.items())
            said.append(f"{target.dataset if is_ours else whose} at {model}: {means}")
        panel.set_xticks(range(len(archs)), [name(arch) for arch in archs], fontsize="small", rotation=20)
        panel.set_title(_title(target) if is_ours else whose, fontsize="small")
        panel.margins(x=0.15)
        panel.grid(alpha=0.3, axis="y")
    _legend(figure, axes[0], [(f"trained at {model}", *_style(style)) for model, style in styles.items()])
    n = _n([len(trials.values) for _, lines, _ in drawn for line in lines.values() for trials in line.values()])
    figure.supylabel(f"{_ACCURACY}, {n}", fontsize="small")
    caption = (
        f"{MODES[mode]} by architecture and width; lines join the widths of one depth. Markers and bars: "
        f"{_LOWEST_TO_HIGHEST} ({n})."
    ) + _paper_words([target for target, _, _ in drawn], _PANELS, shown=len(panels) > len(drawn))
    heads = ["dataset", "setting", "whose", "trained_at", "arch", *_NUMBERS]
    alt = f"{MODES[mode]} by architecture: {'; '.join(said)}."
    picture = save(figure, folder / f"transfer_width_{mode}", heads, rows, caption, alt)
    return Page(f"{MODES[mode]}: width (Figure 6)", (picture,), {})


def _paper_widths(target: Target, epsilon: float) -> dict[str, Trials]:
    papers = {arch: target.paper(arch) for arch in in_order(NAMES)}
    return {arch: Trials((paper.means[epsilon],)) for arch, paper in papers.items() if paper and epsilon in paper.means}


def _draw_widths(panel: Axes, archs: Sequence[str], line: Mapping[str, Trials], style: int, *, hollow: bool) -> None:
    color, marker, dashes = _style(style)
    families: dict[Any, dict[float, Trials]] = {}
    for arch, trials in line.items():
        shape = ARCHITECTURES.get(arch)
        family = (shape.depth, shape.num_groups) if isinstance(shape, ResNetShape) else arch
        families.setdefault(family, {})[archs.index(arch) + 0.05 * (style - 1)] = trials
    for members in families.values():
        for x, trials in members.items():
            _draw_range(panel, x, trials, color)
        means = [trials.mean for trials in members.values()]
        face = "white" if hollow else color
        panel.plot(list(members), means, marker=marker, linestyle=dashes, color=color, markerfacecolor=face)


def downscale_page(mode: str, paired: Sequence[tuple[Target, Target]], folder: Path) -> Page | None:
    """Figure 7.

    Args:
        paired: a data set as it is, and through fewer pixels.
    """
    panels: list[tuple[Target, str, str, str, dict[str, Curve]]] = []
    for original, reduced in paired:
        variants = {_IMAGES: original, f"reduced to {reduced.downscale} px": reduced}
        for arch in original.archs:
            of_norm = [curves(target, arch) for target in variants.values()]
            for norm in sorted(of_norm[0].keys() & of_norm[1].keys()):
                own = {label: found[norm] for label, found in zip(variants, of_norm, strict=True)}
                panels.append((original, "ours", arch, norm, own))
                both = {_IMAGES: original.paper(arch), "reduced to 32 px": original.paper(arch, downscale=32)}
                papers = {label: _paper_curve(paper) for label, paper in both.items() if paper}
                whose = f"paper: {original.paper_name}"
                # Several settings of one data set share a panel of the paper's.
                if papers and norm == "L2" and (whose, arch) not in [(other, a) for _, other, a, *_ in panels]:
                    panels.append((original, whose, arch, norm, papers))
    if not panels:
        return None
    figure, axes = _grid(len(panels), width=3.4)
    labels = list(dict.fromkeys(label for *_, shown in panels for label in shown))
    # All panels of a norm have one axis: the curves are there to be compared.
    ticks = {norm: _ticks(norm, [shown for *_, n, shown in panels if n == norm]) for *_, norm, _ in panels}
    rows: list[list[Any]] = []
    cells, said = [], []
    for panel, (target, whose, arch, norm, shown) in zip(axes, panels, strict=True):
        is_ours = whose == "ours"
        for label, curve in shown.items():
            _draw_curve(panel, curve, ticks[norm], labels.index(label), hollow=not is_ours)
            best, trials = curve.best
            model = ThreatModel(norm, best)
            row = [target.dataset, target.setting, whose, arch, norm, label]
            rows += [[*row, epsilon, *_numbers(one), epsilon == best] for epsilon, one in curve.points]
            rivals = ", ".join(epsilon_text(ThreatModel(norm, epsilon)) for epsilon in curve.rivals) or "none"
            spread = [f"{trials.low:.1f} to {trials.high:.1f}", str(len(trials.values)), rivals]
            row = [target.dataset, target.setting or "-", name(arch), label, whose, str(model), f"{trials.mean:.1f}"]
            cells.append([*row, *(spread if is_ours else ["-", "3", "-"])])
            said.append(
                f"{target.dataset if is_ours else whose} {name(arch)}, {label}: best at {model} with {trials.mean:.1f}"
            )
        _mark_epsilons(panel, ticks[norm], norm)
        panel.set_title(f"{_title(target) if is_ours else whose}\n{name(arch)}", fontsize="small")
    _legend(figure, axes[0], [(label, *_style(index)) for index, label in enumerate(labels)])
    n = _n([row[7] for row in rows if row[2] == "ours"])
    figure.supylabel(f"{_ACCURACY}, {n}", fontsize="small")
    originals = [target for target, whose, *_ in panels if whose == "ours"]
    caption = (
        f"{MODES[mode]} over the ε of pre-training, with images as they are and with images that were reduced, and "
        f"enlarged again. Markers and bars: {_LOWEST_TO_HIGHEST} ({n}); ring and vertical line: the best ε. The panels "
        "have one axis of ε, which is logarithmic, with 0 put beside it."
    ) + _paper_words(originals, _PANELS, shown=len(panels) > len(originals))
    heads = ["dataset", "setting", "whose", "arch", "norm", "images", "epsilon", *_NUMBERS, "is_best"]
    alt = f"{MODES[mode]} over epsilon: {'; '.join(said)}."
    picture = save(figure, folder / f"transfer_downscale_{mode}", heads, rows, caption, alt)
    heads = ["data set", "setting", "architecture", "images", "whose", "best ε", "mean", "min to max", "trials"]
    tables = {f"{MODES[mode]}, best ε": ([*heads, "other ε whose trials reach its"], cells)}
    return Page(f"{MODES[mode]}: images reduced and enlarged again (Figure 7)", (picture,), tables)


_IMAGES = "images as they are"


def _paper_curve(paper: PaperTransfer) -> Curve:
    return Curve(tuple((epsilon, Trials((mean,))) for epsilon, mean in sorted(paper.means.items())))


def _ticks(norm: str, shown: Iterable[Mapping[str, Curve]]) -> dict[float, float]:
    """Epsilon -> its place on the axis."""
    unit = 255 if norm == "Linf" else 1
    epsilons = sorted({epsilon for found in shown for curve in found.values() for epsilon, _ in curve.points})
    return dict(zip(epsilons, epsilon_places([unit * epsilon for epsilon in epsilons]), strict=True))


def _draw_curve(panel: Axes, curve: Curve, places: Mapping[float, float], style: int, *, hollow: bool) -> None:
    color, marker, dashes = _style(style)
    xs, means = [places[epsilon] for epsilon, _ in curve.points], [trials.mean for _, trials in curve.points]
    for x, (_, trials) in zip(xs, curve.points, strict=True):
        _draw_range(panel, x, trials, color)
    face = "white" if hollow else color
    panel.plot(xs, means, marker=marker, linestyle=dashes, color=color, markerfacecolor=face, markersize=5)
    best, trials = curve.best
    panel.axvline(places[best], color=color, linestyle=dashes, linewidth=0.8, alpha=0.6)
    panel.plot(places[best], trials.mean, "o", color=color, markerfacecolor="none", markersize=12)


def _mark_epsilons(panel: Axes, places: Mapping[float, float], norm: str) -> None:
    unit = " (1/255)" if norm == "Linf" else ""
    panel.set_xlabel(f"{NORMS[norm]} ε of pre-training{unit}", fontsize="small")
    panel.xaxis.set_major_locator(FixedLocator(list(places.values())))
    panel.xaxis.set_minor_locator(NullLocator())
    texts = [f"{(255 if unit else 1) * epsilon:g}" for epsilon in places]
    panel.set_xticklabels(texts, fontsize="small", rotation=90 if len(texts) > 6 else 0)
    panel.set_xlim(min(places.values()) - 0.25, max(places.values()) + 0.25)
    panel.grid(alpha=0.3, axis="y")


def _grid(count: int, *, width: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, MOST_COLUMNS, max(1, round(14 / width)))
    lines = -(-count // columns)
    figure = Figure(figsize=(max(5.0, 0.6 + width * columns), 0.7 + 3.1 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.tick_params(labelsize="small")
    return figure, axes[:count]


def _legend(figure: Figure, panel: Axes, entries: Sequence[tuple[str, str, str, Any]]) -> None:
    """One for all panels, from (label, colour, marker, line); a diamond is hollow."""
    handles = []
    for label, color, marker, line in entries:
        face = "white" if marker == "D" and line == "none" else color
        handles += panel.plot([], [], marker=marker, linestyle=line, color=color, markerfacecolor=face, label=label)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(handles)), fontsize="small")


def _title(target: Target) -> str:
    return "\n".join([target.dataset, *textwrap.wrap(target.setting, 34)])


def _with_papers(drawn: Iterable[tuple[Target, T, T]]) -> list[tuple[Target, str, T]]:
    """(data set, whose, what to draw) a panel, from (data set, ours, the paper's or nothing): ours, then the paper's.

    Several settings of one data set share a panel of the paper's.
    """
    panels: list[tuple[Target, str, T]] = []
    for target, ours, papers in drawn:
        panels.append((target, "ours", ours))
        whose = f"paper: {target.paper_name}"
        if papers and not any(known == papers and whose == other for _, other, known in panels):
            panels.append((target, whose, papers))
    return panels


def _draw_trials(panel: Axes, x: float, trials: Trials, style: int) -> None:
    color = COLORS[style]
    _draw_range(panel, x, trials, color)
    panel.plot(x, trials.mean, MARKERS[style], color=color, markersize=7)
    beside = [x + 0.08] * len(trials.values)
    panel.plot(beside, trials.values, "o", color=color, markerfacecolor="none", markersize=3, linestyle="none")


def _draw_range(panel: Axes, x: float, trials: Trials, color: str) -> None:
    reach = [[trials.mean - trials.low], [trials.high - trials.mean]]
    panel.errorbar(x, trials.mean, reach, fmt="none", ecolor=color, capsize=3)


def _style(index: int) -> tuple[str, str, Any]:
    return COLORS[index], MARKERS[index], LINES[index]


def _paper_words(compared: Sequence[Target], where: str, *, shown: bool) -> str:
    """What a caption says of the paper's values, and why they may not compare."""
    if not shown:
        return ""
    found = dict.fromkeys(d for target in compared for d in differences_to_paper_transfer(target.record))
    text = f" {where}: the paper's values ({TRANSFER_SOURCE})"
    if not found:
        return f"{text}, of the same data and budget as far as is known."
    return f"{text}. They are not of the same data and budget: {'; '.join(found)}."


def _n(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"n = {low} trial{'s' * (low > 1)}" if low == high else f"n = {low} to {high} trials"


def _numbers(trials: Trials) -> list[Any]:
    """Cells of a CSV, as ``_NUMBERS``."""
    return [len(trials.values), trials.mean, trials.low, trials.high, " ".join(map(repr, trials.values))]
