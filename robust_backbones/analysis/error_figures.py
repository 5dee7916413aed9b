"""The table and the figure of a detector's error types, by condition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from robust_backbones.analysis.detection_errors import ERRORS, ORACLES, DetectionErrors
from robust_backbones.analysis.figures import COLORS, MOST_CURVES, Picture, grouped_bars, legend_above, save
from robust_backbones.analysis.tables import Table
from robust_backbones.errors import InputError


def error_table(errors: Mapping[str, DetectionErrors]) -> Table:
    """One row per condition: its AP50 and the points that each oracle would give; the CSV also has the counts.

    Args:
        errors: condition (``clean``, ``fog 3``, ``PGD-10``) -> its errors.
    """
    rows = [
        {"condition": condition, "AP50": one.ap50}
        | {f"{name} dAP50": one.delta_ap[name] for name in ORACLES}
        | {f"{name} count": one.counts[name] for name in ORACLES}
        for condition, one in errors.items()
    ]
    oracles = {name: f"{{{name} dAP50:.1f}}" for name in ORACLES}
    return Table("Errors of detectors", rows, {"condition": ":", "AP50": ":.1f", **oracles})


def error_figure(errors: Mapping[str, DetectionErrors], title: str, path: Path) -> Picture:
    """The AP50 points lost to each type of error, one bar per condition; not stacked, because they do not add up.

    Args:
        errors: condition -> its errors, the clean one first.
        title: what is evaluated, such as a detector and a test set.
        path: of its files, without suffixes.

    Raises:
        InputError: there are no conditions, or more than MOST_CURVES.
    """
    if not 0 < len(errors) <= MOST_CURVES:
        raise InputError(f"a figure shows 1 to {MOST_CURVES} conditions, not {len(errors)}: choose those to compare")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    # The last two are no types of error but sums of a kind, and stand apart.
    centers = [place + 0.5 * (name not in ERRORS) for place, name in enumerate(ORACLES)]
    bars = {
        f"{name}, AP50 {one.ap50:.1f}": [one.delta_ap[oracle] for oracle in ORACLES] for name, one in errors.items()
    }
    grouped_bars(axes, centers, bars)
    axes.axvline(len(ERRORS) - 0.25, color=COLORS[0], linewidth=1, linestyle=":")
    axes.set_xticks(centers, [name.replace(" ", "\n") for name in ORACLES], fontsize="small")
    axes.set_ylabel("AP50 points that its repair gives")
    legend_above(figure, 3)
    caption = (
        f"{title}: what AP50 loses to each type of error (TIDE). Bars: the points that repairing this type alone would "
        "give; they do not add up to the loss. Both: wrong class and wrong place. Right of the dotted line: all wrong "
        "detections removed, and all objects that are not found taken out."
    )
    points = [
        f"{condition}: AP50 {one.ap50:.1f}, " + ", ".join(f"{name} {one.delta_ap[name]:.1f}" for name in ORACLES)
        for condition, one in errors.items()
    ]
    alt = f"AP50 points lost to each type of error; {'; '.join(points)}."
    return save(figure, path, error_table(errors).rows, caption, alt)
