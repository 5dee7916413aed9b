"""Common parts of figures: SVG, PNG and numbers as CSV; all figures are readable without colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from robust_backbones.analysis.tables import Table
from robust_backbones.runs.files import atomic_path, write_text

# Okabe and Ito's palette, which colour-blind eyes can read, without its yellow, which is too light for lines.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "oo")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
STYLES = tuple(zip(COLORS, MARKERS, LINES, strict=True))
"""(Colour, marker, line) of a curve, by its index."""
MOST_CURVES = len(STYLES)
DPI = 150
"""Resolution of PNGs."""
NORMS = {"L2": "ℓ2", "Linf": "ℓ∞"}
NAMES = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "wide_resnet50_2": "WRN-50-2",
    "wide_resnet50_4": "WRN-50-4",
    "resnext50_32x4d": "ResNeXt-50",
    "resnext101_32x8d": "ResNeXt-101",
    "densenet161": "DenseNet-161",
    "mnasnet1_0": "MNASNet",
    "mobilenet_v2": "MobileNet-v2",
    "shufflenet_v2_x1_0": "ShuffleNet",
    "vgg16_bn": "VGG16-BN",
}
"""Architecture -> its name in figures."""


@dataclass(frozen=True)
class Picture:
    """A picture's file (maybe with a ``.png`` and a ``.csv`` beside it), its caption, and its alternative text."""

    file: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Page:
    """One section of a report."""

    title: str
    pictures: Sequence[Picture]
    tables: Sequence[Table] = ()


def as_written(figure: Figure) -> Figure:
    """The figure with literal texts: a ``$`` in a name does not start a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def save(figure: Figure, path: Path, rows: Sequence[Mapping[str, Any]], caption: str, alt: str) -> Picture:
    """Write a figure as SVG and PNG, and its numbers as CSV.

    Args:
        path: of its files, without suffixes.
        rows: the numbers in it, as in ``Table``.
    """
    # A fixed salt and no date: the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "robust-backbones"}):
        if engine := as_written(figure).get_layout_engine():  # once for both
            engine.execute(figure)
            figure.set_layout_engine("none")
        for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": DPI})):
            with atomic_path(path.with_name(path.name + suffix)) as temporary:
                figure.savefig(temporary, format=suffix[1:], **options)
    write_text(path.with_name(path.name + ".csv"), Table("", rows, {}).to_csv())
    return Picture(path.with_name(path.name + ".svg"), caption, alt)


def number_of(counts: Sequence[int], what: str) -> str:
    """``n = 3 seeds``, or ``n = 2 to 3 seeds`` if they differ."""
    low, high = min(counts), max(counts)
    return f"n = {low} {what}{'s' * (low > 1)}" if low == high else f"n = {low} to {high} {what}s"


def grouped_bars(
    axes: Axes,
    centers: Sequence[float],
    groups: Mapping[str, Sequence[float]],
    reach: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Bars beside each other at each centre, with one colour and hatch per group.

    Args:
        groups: label -> one value per centre; at most MOST_CURVES.
        reach: label -> the extent of each value's interval, down and up.
    """
    width = 0.84 / len(groups)
    for index, (label, values) in enumerate(groups.items()):
        axes.bar(
            [center + (index - (len(groups) - 1) / 2) * width for center in centers],
            values,
            0.86 * width,
            yerr=[*zip(*reach[label], strict=True)] if reach else None,
            capsize=3,
            label=label,
            facecolor="white" if HATCHES[index] else COLORS[index],
            edgecolor=COLORS[index],
            hatch=HATCHES[index],
        )
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def legend_above(figure: Figure, columns: int, handles: Sequence[Artist] | None = None) -> None:
    """One legend above all panels, in as many columns, ``columns`` at most, as the width of the figure has room for."""
    given = {} if handles is None else {"handles": handles}
    for count in range(columns, 0, -1):
        legend = figure.legend(loc="outside upper center", ncols=count, fontsize="small", **given)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def epsilon_places(epsilons: Sequence[float]) -> list[float]:
    """Positions on a logarithmic axis, one unit per factor of ten, with 0 half a unit below the smallest other."""
    smallest = min((epsilon for epsilon in epsilons if epsilon > 0), default=1.0)
    return [math.log10(epsilon / smallest) + 0.5 if epsilon > 0 else 0.0 for epsilon in epsilons]


def epsilon_axis(axes: Axes, norm: str, places: Mapping[float, float]) -> None:
    """Label the axis of the epsilons of pre-training.

    Args:
        places: epsilon in [0, 1] -> its position on the axis.
    """
    unit, text = (255, "in 1/255") if norm == "Linf" else (1, "pixels in [0, 1]")
    axes.set_xlabel(f"{NORMS[norm]} ε of pre-training ({text})", fontsize="small")
    labels = [f"{unit * epsilon:g}" for epsilon in places]
    axes.set_xticks([*places.values()], labels, fontsize="small", rotation=90 if len(labels) > 6 else 0)
    axes.set_xlim(min(places.values()) - 0.25, max(places.values()) + 0.25)
    axes.grid(alpha=0.3, axis="y")
