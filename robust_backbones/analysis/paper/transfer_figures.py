"""Tables and figures of classification transfer, as in Salman et al. 2020, for any set of backbones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from robust_backbones.analysis.figures import (
    COLORS,
    MARKERS,
    MOST_CURVES,
    NAMES,
    NORMS,
    STYLES,
    Page,
    Picture,
    epsilon_axis,
    epsilon_places,
)
from robust_backbones.analysis.paper.drawing import MODES, Drawing, draw, with_papers
from robust_backbones.analysis.paper.transfer_results import (
    STAND_IN,
    Curve,
    Point,
    Pretrainings,
    Series,
    Target,
    TransferSource,
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
from robust_backbones.analysis.paper.values import (
    PaperTransfer,
    paper_transfer_linf,
    table_2,
)
from robust_backbones.analysis.records import RecordedRun
from robust_backbones.analysis.tables import Table
from robust_backbones.checkpoint import zoo
from robust_backbones.models import ARCHITECTURES, ResNetShape
from robust_backbones.threat_models import ThreatModel

BEST = {"standard": "standard", "robust": "best robust"}
TEXTURE = {**BEST, "stylized": "texture-trained"}
"""Kind of a backbone -> its name in legends, in the order of colours and markers."""
_RANGE = "mean of the trials and their range from the lowest to the highest"
_IMAGES = "images as they are"


def transfer_pages(runs: Sequence[RecordedRun], folder: Path) -> list[Page]:
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
            linf_page(mode, found),
        ]
    return [page for page in pages if page is not None]


def best_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Table 1, and Figure 2 (fixed-feature) or 3 (full-network)."""
    picture = _kinds_figure(mode, found, BEST, ("standard", "robust"), folder / f"transfer_best_{mode}")
    if picture is None:
        return None
    number = list(MODES).index(mode) + 2
    title = f"{MODES[mode]}: best robust against standard (Table 1, Figure {number})"
    return Page(title, [picture], [best_table(mode, found)])


def best_table(mode: str, found: Sequence[Target]) -> Table:
    """Table 1: the best standard and the best robust backbone of each data set, and the paper's."""
    ours = {head: f"{{{head}:.1f}} ({{{head} min:.1f}} to {{{head} max:.1f}}) {{{head} of}}" for head in BEST.values()}
    papers = {f"paper: {head}": f"{{paper {head}:.1f}} {{paper {head} of}}" for head in [*BEST.values(), "best trial"]}
    columns = {"data set": ":", "setting": ":", **ours, "difference": ":+.1f", "trials": ":", **papers}
    rows = [row for target in found if (row := _table_1(target))]
    return Table(f"{MODES[mode]} of the best architectures", rows, columns)


def linf_page(mode: str, found: Sequence[Target]) -> Page | None:
    """The table of l-infinity backbones beside the paper's; none if none was transferred to its data sets."""
    rows: list[dict[str, Any]] = []
    for target in found:
        own = []
        for arch in target.archs:
            papers = paper_transfer_linf(target.dataset, arch, mode)
            for model in target.threat_models:
                epsilon = round(255 * model.epsilon, 6)
                if (model.norm == "Linf" or not epsilon) and papers and (trials := target.trials(arch, model)):
                    head = {"data set": target.dataset, "setting": target.setting or None, "architecture": name(arch)}
                    own.append({**head, "trained at": str(model), "ours": str(trials), "paper": papers.get(epsilon)})
        rows += own if any(str(row["trained at"]).startswith("Linf:") for row in own) else []
    columns = {"data set": ":", "setting": ":", "architecture": ":", "trained at": ":", "ours": ":", "paper": ":.1f"}
    title = f"{MODES[mode]} from l-infinity backbones (the paper's appendix)"
    return Page(title, [], [Table(title, rows, columns)]) if rows else None


def texture_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Figure 8; backbones of ``pretrain --stylize`` are labelled as a stand-in."""
    sources = [source for target in found for source in target.sources if source.kind == "stylized"]
    stands_in = any(source.pretraining and source.pretraining.stand_in for source in sources)
    kinds = {**TEXTURE, "stylized": STAND_IN} if stands_in else TEXTURE
    picture = _kinds_figure(mode, found, kinds, ("stylized",), folder / f"transfer_texture_{mode}")
    title = f"{MODES[mode]}: standard, robust and {kinds['stylized']} (Figure 8)"
    return Page(title, [picture]) if picture else None


def _kinds_figure(
    mode: str, found: Sequence[Target], kinds: Mapping[str, str], needed: Sequence[str], path: Path
) -> Picture | None:
    """One panel per data set: for each architecture the best backbone of each kind; none if kinds are missing."""
    panels = []
    for target in found:
        ranked = {arch: {kind: target.of_kind(arch, kind) for kind in kinds} for arch in target.archs}
        ranked = {arch: {kind: ss for kind, ss in of_arch.items() if ss} for arch, of_arch in ranked.items()}
        shown = {arch: of for arch, of in ranked.items() if len(of) > 1 and {*needed} <= of.keys()}
        if shown:
            panels.append((target, shown))
    drawing = Drawing.of(mode, [target for target, _ in panels], 1.6 + 0.8 * max([len(s) for _, s in panels] or [0]))
    for panel, (target, shown) in zip(drawing.axes, panels, strict=True):
        for center, (arch, ranked_kinds) in enumerate(shown.items()):
            for place, (kind, sources) in enumerate(ranked_kinds.items()):
                source, style = sources[0], list(kinds).index(kind)
                x = center + 0.26 * (place - (len(ranked_kinds) - 1) / 2)
                draw(panel, [(x, source.trials)], style, markersize=7)
                beside = [x + 0.08] * len(source.trials.values)
                panel.plot(beside, source.trials.values, "o", color=COLORS[style], mfc="none", markersize=3)
                epsilon, paper = _paper_of_kind(target.paper(arch), kind) or (None, None)
                if paper is not None:
                    panel.plot(x, paper, "D", color=COLORS[style], markerfacecolor="white", markersize=5)
                row: dict[str, Any] = {"arch": arch, "kind": kind, "backbone": source.name}
                row |= {"trained_at": str(source.threat_model)}
                row |= {"candidates": len(sources), **source.trials.numbers}
                drawing.add(target, f"{name(arch)} {kinds[kind]} {source.trials}", row)
                drawing.rows[-1] |= {"paper_epsilon": epsilon, "paper_mean": paper}
        panel.set_xticks(range(len(shown)), [name(arch) for arch in shown], fontsize="small")
        panel.set_xlim(-0.6, len(shown) - 0.4)
        drawing.set_title(panel, target, "ours")
    if not panels:
        return None
    drawing.has_paper = any(row["paper_mean"] is not None for row in drawing.rows)
    entries = [(label, COLORS[i], MARKERS[i], "none") for i, label in enumerate(kinds.values())]
    drawing.legend([*entries, *([("the paper's", COLORS[0], "D", "none")] * drawing.has_paper)])
    caption = (
        f": {' against '.join(kinds.values())}, a pair of each architecture. Filled markers and bars: {_RANGE} "
        f"({drawing.n}); small circles: the trials. Best is what has the highest mean in this figure, as in the paper: "
        "the best of many looks better than it is."
    )
    return drawing.save(path, caption, "", "Hollow diamonds")


def _paper_of_kind(paper: PaperTransfer | None, kind: str) -> tuple[float, float] | None:
    """(epsilon, mean) of the paper's standard or best robust backbone; it has no numbers for texture-trained ones."""
    if paper is None or kind == "stylized":
        return None
    means = {epsilon: mean for epsilon, mean in paper.means.items() if (epsilon == 0) == (kind == "standard")}
    return max(means.items(), key=lambda item: item[1])


def _table_1(target: Target) -> dict[str, Any] | None:
    """The best of all architectures with both kinds, and of all of the paper's; None without such an architecture."""
    row: dict[str, Any] = {"data set": target.dataset, "setting": target.setting or None}
    archs = [arch for arch in target.archs if all(target.of_kind(arch, kind) for kind in BEST)]
    if not archs:
        return None
    best: list[TransferSource] = []
    for kind, head in BEST.items():
        candidates = [source for arch in archs for source in target.of_kind(arch, kind)]
        best.append(max(candidates, key=lambda source: source.trials.mean))
        trials, of = best[-1].trials, f"{name(best[-1].arch)}, {best[-1].threat_model}"
        row |= {head: trials.mean, f"{head} min": trials.low, f"{head} max": trials.high, f"{head} of": of}
    row["difference"] = best[1].trials.mean - best[0].trials.mean
    row["trials"] = " and ".join(dict.fromkeys(str(len(source.trials.values)) for source in best))
    papers = {arch: paper for arch in NAMES if (paper := target.paper(arch))}
    for kind, head in [*BEST.items(), ("", "best trial")]:
        values = {arch: _paper_of_kind(paper, kind) if kind else paper.best_trial for arch, paper in papers.items()}
        known = [(value[1], value[0], arch) for arch, value in values.items() if value]
        mean, epsilon, arch = max(known, default=(None, None, ""))
        row |= {f"paper {head}": mean, f"paper {head} of": f"{name(arch)}, L2:{epsilon:g}" if known else None}
    return row


def accuracy_page(mode: str, found: Sequence[Target], folder: Path) -> Page | None:
    """Figure 5 (over epsilons) and Table 2 (over architectures at a fixed epsilon)."""
    pictures, rows = [], []
    for ours_of, papers_of, stem, over in (
        (over_epsilons, _paper_over_epsilons, "accuracy", "over the ε of pre-training, which stands at the points"),
        (over_architectures, _paper_table_2, "fixed_epsilon", "over architectures, at one ε a series"),
    ):
        panels = with_papers((target, ours, papers_of(target)) for target in found if (ours := ours_of(target)))
        if panels:
            pictures.append(_accuracy_figure(mode, panels, folder / f"transfer_{stem}_{mode}", over))
            rows += [_fit_row(target, whose, one) for target, whose, series in panels for one in series]
    columns = {**dict.fromkeys(("data set", "setting", "series", "n"), ":"), "R²": ":.2f", "slope": ":+.2f"}
    table = Table(f"{MODES[mode]}, lines through source accuracy", rows, {**columns, "whose": ":"})
    title = f"{MODES[mode]}: source accuracy (Figure 5, Table 2)"
    return Page(title, pictures, [table]) if pictures else None


def _fit_row(target: Target, whose: str, series: Series) -> dict[str, Any]:
    fit, n = series.fit, len(series.points)
    why = "" if fit else ("; no line through fewer than 3" if n < 3 else "; no line, an axis is constant")
    row = {"data set": target.dataset, "setting": target.setting or None, "series": series.label, "n": n}
    return {**row, "R²": fit and fit.r_squared, "slope": fit and fit.slope, "whose": whose + why}


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
        for label, values in table_2().items()
    ]


def _accuracy_figure(mode: str, panels: Sequence[tuple[Target, str, list[Series]]], path: Path, over: str) -> Picture:
    """One panel per data set, and beside it one with the paper's points, which has other axes."""
    drawing = Drawing.of(mode, [target for target, whose, _ in panels if whose == "ours"], 3.7, count=len(panels))
    for panel, (target, whose, series) in zip(drawing.axes, panels, strict=True):
        for index, one in enumerate(series):
            color, label = COLORS[index % MOST_CURVES], f"{one.label}: {one.fit_text}"
            points = [(x, trials) for x, trials, _ in one.points]
            draw(panel, points, index % MOST_CURVES, hollow=whose != "ours", label=label)
            fit = {} if one.fit is None else vars(one.fit)
            if one.fit:
                ends = [reduce(x for x, _ in points) for reduce in (min, max)]
                panel.plot(ends, [one.fit.intercept + one.fit.slope * end for end in ends], ":", color=color)
            rows = [
                {"series": one.label, "point": text, "source_accuracy": x, **trials.numbers}
                | {key: fit.get(key) for key in ("slope", "intercept", "r_squared")}
                for x, trials, text in one.points
            ]
            drawing.add(target, f"{one.label}: {one.fit_text}", *rows, whose=whose)
        drawing.set_title(panel, target, whose)
        names = sorted({source.pretraining.dataset for source in target.sources if source.pretraining})
        panel.set_xlabel(f"accuracy on {' or '.join(names) if whose == 'ours' else 'ImageNet'}", fontsize="small")
        panel.legend(fontsize="x-small")
        panel.grid(alpha=0.3, axis="x")
        _label_points(panel, [point for one in series for point in one.points])
    caption = (
        f": accuracy of the backbone on what it was trained on (0-100) and after transfer, {over}. Markers and bars: "
        f"{_RANGE} ({drawing.n}). Dotted: the least-squares line through the means, of 3 points or more; R², the share "
        "of variance that it explains, says little of few points (n in the legends). Not all points are labelled where "
        "they crowd."
    )
    return drawing.save(path, caption, " over source accuracy")


def _label_points(panel: Axes, points: Sequence[Point]) -> None:
    """Labels beside the points, without those that would overlap an earlier one."""
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
    drawn: list[tuple[Target, dict[ThreatModel, dict[str, Trials]], dict[ThreatModel, dict[str, Trials]]]] = []
    for target in found:
        ours = {
            model: {arch: trials for arch in target.archs if (trials := target.trials(arch, model))}
            for model in target.threat_models
        }
        ours = {model: line for model, line in ours.items() if len(line) > 1}
        if ours:
            shown = sorted({0.0, 3.0} | {model.epsilon for model in ours if model.norm == "L2"})
            papers = {ThreatModel("L2", epsilon): _paper_widths(target, epsilon) for epsilon in shown}
            drawn.append((target, ours, {model: line for model, line in papers.items() if len(line) > 1}))
    if not drawn:
        return None
    panels = with_papers(drawn)
    models = sorted({model for _, _, lines in panels for model in lines}, key=lambda model: (model.norm, model.epsilon))
    styles = {model: index % MOST_CURVES for index, model in enumerate(models)}
    drawing = Drawing.of(mode, [target for target, *_ in drawn], 3.4, count=len(panels))
    for panel, (target, whose, lines) in zip(drawing.axes, panels, strict=True):
        archs = in_order({arch for line in lines.values() for arch in line})
        for model, line in lines.items():
            families: dict[Any, list[tuple[float, Trials]]] = {}
            for arch, trials in line.items():
                shape = ARCHITECTURES.get(arch)
                family = (shape.depth, shape.num_groups) if isinstance(shape, ResNetShape) else arch
                families.setdefault(family, []).append((archs.index(arch) + 0.05 * (styles[model] - 1), trials))
            for points in families.values():
                draw(panel, points, styles[model], line=STYLES[styles[model]][2], hollow=whose != "ours")
            means = ", ".join(f"{name(arch)} {trials.mean:.1f}" for arch, trials in line.items())
            rows = [{"trained_at": str(model), "arch": arch, **trials.numbers} for arch, trials in line.items()]
            drawing.add(target, f"at {model}: {means}", *rows, whose=whose)
        panel.set_xticks(range(len(archs)), [name(arch) for arch in archs], fontsize="small", rotation=20)
        drawing.set_title(panel, target, whose)
        panel.margins(x=0.15)
    drawing.legend([(f"trained at {model}", *STYLES[style]) for model, style in styles.items()])
    caption = f" by architecture and width; lines join the widths of one depth. Markers and bars: {_RANGE}"
    picture = drawing.save(folder / f"transfer_width_{mode}", f"{caption} ({drawing.n}).", " by architecture")
    return Page(f"{MODES[mode]}: width (Figure 6)", [picture])


def _paper_widths(target: Target, epsilon: float) -> dict[str, Trials]:
    papers = {arch: target.paper(arch) for arch in in_order(NAMES)}
    return {arch: Trials((paper.means[epsilon],)) for arch, paper in papers.items() if paper and epsilon in paper.means}


def downscale_page(mode: str, paired: Sequence[tuple[Target, Target]], folder: Path) -> Page | None:
    """Figure 7.

    Args:
        paired: a data set at full resolution and downscaled.
    """
    drawn: list[tuple[Target, tuple[Any, ...], tuple[Any, ...]]] = []
    for original, reduced in paired:
        variants = {_IMAGES: original, f"reduced to {reduced.downscale} px": reduced}
        for arch in original.archs:
            of_norm = [curves(target, arch) for target in variants.values()]
            for norm in sorted(of_norm[0].keys() & of_norm[1].keys()):
                own = {label: found[norm] for label, found in zip(variants, of_norm, strict=True)}
                both = {_IMAGES: original.paper(arch), "reduced to 32 px": original.paper(arch, downscale=32)}
                papers = {label: _paper_curve(paper) for label, paper in both.items() if paper}
                drawn.append((original, (arch, norm, own), (arch, norm, papers) if papers and norm == "L2" else ()))
    if not drawn:
        return None
    panels = with_papers(drawn)
    drawing = Drawing.of(mode, [target for target, *_ in drawn], 3.4, count=len(panels))
    labels = list(dict.fromkeys(label for *_, (_, _, shown) in panels for label in shown))
    # All panels of a norm have one axis: the curves are there to be compared.
    norms = {norm for *_, (_, norm, _) in panels}
    ticks = {norm: _ticks([shown for *_, (_, n, shown) in panels if n == norm]) for norm in norms}
    cells = []
    for panel, (target, whose, (arch, norm, shown)) in zip(drawing.axes, panels, strict=True):
        for label, curve in shown.items():
            style, (best, trials), places = labels.index(label), curve.best, ticks[norm]
            color, _, dashes = STYLES[style]
            points = [(places[epsilon], one) for epsilon, one in curve.points]
            draw(panel, points, style, line=dashes, hollow=whose != "ours", markersize=5)
            panel.axvline(places[best], color=color, linestyle=dashes, linewidth=0.8, alpha=0.6)
            panel.plot(places[best], trials.mean, "o", color=color, markerfacecolor="none", markersize=12)
            rows = [
                {"arch": arch, "norm": norm, "images": label, "epsilon": epsilon}
                | {**one.numbers, "is_best": epsilon == best}
                for epsilon, one in curve.points
            ]
            model = ThreatModel(norm, best)
            drawing.add(target, f"{name(arch)}, {label}: best at {model} with {trials.mean:.1f}", *rows, whose=whose)
            rivals = ", ".join(epsilon_text(ThreatModel(norm, epsilon)) for epsilon in curve.rivals) or "none"
            spread = {"min": trials.low, "max": trials.high, "trials": len(trials.values), "rivals": rivals}
            cells.append(
                {"data set": target.dataset, "setting": target.setting or None, "architecture": name(arch)}
                | {"images": label, "whose": whose, "best ε": str(model), "mean": trials.mean}
                | (spread if whose == "ours" else {"trials": 3})
            )
        epsilon_axis(panel, norm, ticks[norm])
        drawing.set_title(panel, target, whose, name(arch))
    drawing.legend([(label, *STYLES[index]) for index, label in enumerate(labels)])
    caption = (
        " over the ε of pre-training, with images as they are and with images that were reduced, and enlarged again. "
        f"Markers and bars: {_RANGE} ({drawing.n}); ring and vertical line: the best ε. The panels have one axis of ε, "
        "which is logarithmic, with 0 put beside it."
    )
    picture = drawing.save(folder / f"transfer_downscale_{mode}", caption, " over epsilon")
    columns = dict.fromkeys(("data set", "setting", "architecture", "images", "whose", "best ε"), ":")
    columns |= {"mean": ":.1f", "min to max": "{min:.1f} to {max:.1f}", "trials": ":"}
    table = Table(f"{MODES[mode]}, best ε", cells, {**columns, "other ε whose trials reach its": "{rivals}"})
    return Page(f"{MODES[mode]}: images reduced and enlarged again (Figure 7)", [picture], [table])


def _paper_curve(paper: PaperTransfer) -> Curve:
    return Curve(tuple((epsilon, Trials((mean,))) for epsilon, mean in sorted(paper.means.items())))


def _ticks(shown: Iterable[Mapping[str, Curve]]) -> dict[float, float]:
    """Epsilon -> its position on the axis."""
    epsilons = sorted({epsilon for found in shown for curve in found.values() for epsilon, _ in curve.points})
    return dict(zip(epsilons, epsilon_places(epsilons), strict=True))
