"""Measures of visualisations as means and paired differences, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from robust_backbones.analysis.figures import as_written
from robust_backbones.analysis.statistics import summarize
from robust_backbones.analysis.tables import Table
from robust_backbones.runs.files import atomic_path

Row = Mapping[str, Any]


def metrics_of(rows: Sequence[Row], names: Sequence[str], *, compared: bool) -> dict[str, float | None]:
    """Means over images as ``NAME/MEASURE``, in the measure's own unit.

    ``NAME - FIRST/MEASURE`` is the mean of the paired differences; ``_low`` and ``_high`` are its 95 % t interval.
    """
    measures = [name for name in rows[0] if name not in ("image", "backbone")]
    columns = {
        (name, measure): [row[measure] for row in rows if row["backbone"] == name]
        for name in dict.fromkeys(row["backbone"] for row in rows)
        for measure in measures
    }
    metrics: dict[str, float | None] = {
        f"{name}/{measure}": fmean(values) for (name, measure), values in columns.items() if None not in values
    }
    first, *others = names
    for name in others if compared else []:
        for measure in measures:
            pairs = zip(columns[name, measure], columns[first, measure], strict=True)
            difference = summarize([value - reference for value, reference in pairs])
            key = f"{name} - {first}/{measure}"
            metrics |= {key: difference.mean, f"{key}_low": difference.low, f"{key}_high": difference.high}
    return metrics


def table(metrics: Mapping[str, float | None]) -> list[str]:
    """One line per backbone, and one per difference with its 95 % interval."""
    split = [key.rsplit("/", 1) for key in metrics if not key.endswith(("_low", "_high"))]
    names, measures = (list(dict.fromkeys(column)) for column in zip(*split, strict=True))
    ends = [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    rows = [{"": name, **{end: metrics.get(f"{name}/{end}") for end in ends}} for name in names]
    formats = {m: (f"{{{m}:+.3f}} ({{{m}_low:+.3f}} to {{{m}_high:+.3f}})", ":.3f") for m in measures}
    return Table("", rows, {"": ":", **formats}).to_text().splitlines()


def draw_grid(path: Path, rows: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """Write a PNG with a named row of images for each entry, and a title over each column.

    Args:
        rows: name -> images of shape (N, 3, H, W), in [0, 1].
        titles: N of them, or none.
    """
    side, margin, columns = 1.1, 0.3, len(next(iter(rows.values())))  # inches
    width, height = margin + side * columns, margin * bool(titles) + side * len(rows)
    figure = Figure(figsize=(width, height))
    edges = {"left": margin / width, "right": 1, "bottom": 0, "top": side * len(rows) / height}
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.03, "hspace": 0.03})
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=8)
    with atomic_path(path) as temporary:
        as_written(figure).savefig(temporary, format="png", dpi=200)
