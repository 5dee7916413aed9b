"""Common parts of transfer figures: panels of data sets, with our trials and beside them the paper's values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_backbones.analysis.figures import STYLES, Picture, legend_above, number_of, save
from robust_backbones.analysis.paper.transfer_results import Target, Trials
from robust_backbones.analysis.paper.values import TRANSFER_SOURCE, differences_to_paper_transfer

T = TypeVar("T")

MODES = {"linear_probe": "Fixed-feature transfer", "full_network": "Full-network transfer"}
MOST_COLUMNS = 4


@dataclass
class Drawing:
    """A figure of panels, each of a data set, with our values or the paper's, and its content in numbers and words."""

    mode: str
    compared: Sequence[Target]
    figure: Figure
    axes: Sequence[Axes]
    rows: list[dict[str, Any]]
    words: list[str]
    has_paper: bool

    @classmethod
    def of(cls, mode: str, compared: Sequence[Target], width: float, *, count: int | None = None) -> Drawing:
        """``count`` panels of ``width`` inches, of these data sets and the paper's."""
        count = len(compared) if count is None else count
        columns = max(1, min(count, MOST_COLUMNS, round(14 / width)))
        lines = -(-count // columns) or 1
        figure = Figure(figsize=(max(5.0, 0.6 + width * columns), 0.7 + 3.1 * lines), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for unused in axes[count:]:
            unused.remove()
        for panel in axes[:count]:
            panel.tick_params(labelsize="small")
            panel.grid(alpha=0.3, axis="y")
        return cls(mode, compared, figure, axes[:count], [], [], count > len(compared))

    @property
    def n(self) -> str:
        """The number of trials in our means."""
        return number_of([row["n"] for row in self.rows if row.get("whose", "ours") == "ours"], "trial")

    def add(self, target: Target, words: str, *rows: Mapping[str, Any], whose: str = "") -> None:
        """Rows of the CSV, and the same in words; ``whose`` is a column if the paper has its own panels."""
        of = {"dataset": target.dataset, "setting": target.setting, **({"whose": whose} if whose else {})}
        self.rows += [{**of, **row} for row in rows]
        self.words.append(f"{target.dataset if whose in ('', 'ours') else whose} {words}")

    def set_title(self, panel: Axes, target: Target, whose: str, *more: str) -> None:
        ours = [target.dataset, *textwrap.wrap(target.setting, 34)]
        panel.set_title("\n".join([*(ours if whose == "ours" else [whose]), *more]), fontsize="small")

    def legend(self, entries: Sequence[tuple[str, str, str, Any]]) -> None:
        """One legend for all panels, from (label, colour, marker, line); a diamond is hollow."""
        handles = []
        for label, color, marker, line in entries:
            face = "white" if marker == "D" and line == "none" else color
            handles += self.axes[0].plot([], [], marker=marker, linestyle=line, color=color, mfc=face, label=label)
        legend_above(self.figure, min(3, len(handles)), handles)

    def save(self, path: Path, caption: str, alt: str, where: str = "Hollow markers in panels of their own") -> Picture:
        """``caption`` and ``alt`` follow the name of the mode; ``where`` says how the paper's values are drawn."""
        self.figure.supylabel(f"accuracy after transfer (0-100), {self.n}", fontsize="small")
        if self.has_paper:
            caption += f" {where}: the paper's values ({TRANSFER_SOURCE})"
            found = dict.fromkeys(d for target in self.compared for d in differences_to_paper_transfer(target.record))
            differences = f". They are not of the same data and budget: {'; '.join(found)}."
            caption += differences if found else ", of the same data and budget as far as is known."
        name = MODES[self.mode]
        return save(self.figure, path, self.rows, f"{name}{caption}", f"{name}{alt}: {'; '.join(self.words)}.")


def with_papers(drawn: Iterable[tuple[Target, T, T]]) -> list[tuple[Target, str, T]]:
    """(data set, whose, what to draw) for each panel, from (data set, ours, the paper's or None), ours first.

    Several settings of one data set share one panel of the paper's.
    """
    panels: list[tuple[Target, str, T]] = []
    for target, ours, papers in drawn:
        panels.append((target, "ours", ours))
        whose = f"paper: {target.paper_name}"
        if papers and not any(known == papers and whose == other for _, other, known in panels):
            panels.append((target, whose, papers))
    return panels


def draw(
    panel: Axes,
    points: Sequence[tuple[float, Trials]],
    style: int,
    *,
    line: Any = "none",
    hollow: bool = False,
    **options: Any,
) -> None:
    """Means of trials, with ranges from the lowest to the highest."""
    color, marker, _ = STYLES[style]
    xs, trials = zip(*points, strict=True)
    reach = [[one.mean - one.low for one in trials], [one.high - one.mean for one in trials]]
    options |= {"marker": marker, "linestyle": line, "color": color, "mfc": "white" if hollow else color}
    panel.errorbar(xs, [one.mean for one in trials], reach, capsize=3, **options)
