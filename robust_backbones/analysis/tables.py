"""Tables: rows of exact values, and their display in Markdown, CSV, LaTeX, HTML and plain text."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from robust_backbones.analysis.statistics import p_value
from robust_backbones.runs.files import write_text


@dataclass(frozen=True)
class Table:
    """Rows of exact values by name, and the displayed columns.

    A column's cell uses the first of its formats for which the row has all values, else ``-``. A format such as
    ``{mean:.2f} ± {std:.2f}`` names values of the row; ``:.2f`` applies to the value with the column's name, and ``p``
    is the format of p values. ``None`` is a missing value. Values whose names begin with ``_`` are only displayed.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str | Sequence[str]]
    """Column title -> format, or formats from the most to the least detailed."""
    notes: Sequence[str] = field(default=())

    @classmethod
    def of(cls, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
        """A table whose values are shown unchanged."""
        return cls("", [dict(zip(heads, row, strict=True)) for row in rows], dict.fromkeys(heads, ":"))

    @property
    def cells(self) -> list[list[str]]:
        """The displayed rows."""
        return [[_shown(row, head, forms) for head, forms in self.columns.items()] for row in self.rows]

    def to_markdown(self) -> str:
        """The first column is text, the others are numbers."""
        lines = [list(self.columns), ["---"] + ["---:"] * (len(self.columns) - 1), *self.cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_csv(self) -> str:
        """All values, unrounded, by RFC 4180 but with plain line ends; missing values are empty."""
        names = dict.fromkeys(name for row in self.rows for name in row if not name.startswith("_"))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names or self.columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_latex(self, label: str) -> str:
        """A table environment that needs no package; text is escaped, and notes are below in small print."""
        head, *body = (" & ".join(map(_latex_text, line)) + r" \\" for line in [list(self.columns), *self.cells])
        form = "l" * 2 + "r" * (len(self.columns) - 3) + r"p{0.3\textwidth}"
        below = "".join(f"\\par {_latex_text(note)}\n" for note in self.notes)
        return (
            "\\begin{table}\n\\centering\\footnotesize\n"
            f"\\caption{{{_latex_text(self.title)}}}\n\\label{{tab:{label}}}\n"
            f"\\begin{{tabular}}{{{form}}}\n\\hline\n"
            + "\n".join([head, r"\hline", *body, r"\hline"])
            + f"\n\\end{{tabular}}\n{below}\\end{{table}}\n"
        )

    def to_html(self) -> str:
        """A table that scrolls within itself on a narrow screen, by keyboard too."""

        def line(cells: Sequence[str], tag: str) -> str:
            words = [' class="words"' if head == "in words" else "" for head in self.columns]
            scope = ' scope="col"' if tag == "th" else ""
            heads = [f' data-head="{escape(head)}"' if tag == "td" else "" for head in self.columns]
            parts = zip(cells, words, heads, strict=True)
            return "".join(f"<{tag}{scope}{word}{head}>{escape(cell)}</{tag}>" for cell, word, head in parts)

        marks = [' class="paper"' if row[0].startswith("paper: ") else "" for row in self.cells]
        body = "\n".join(f"<tr{mark}>{line(row, 'td')}</tr>" for row, mark in zip(self.cells, marks, strict=True))
        return (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.title)}">\n<table>\n'
            f"<caption>{escape(self.title)}</caption>\n<thead><tr>{line(list(self.columns), 'th')}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )

    def to_text(self) -> str:
        """Aligned columns for a terminal: the first to the left, the others to the right."""
        lines = [list(self.columns), *self.cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        form = "  ".join(f"{{:{'>' if place else '<'}{width}}}" for place, width in enumerate(widths))
        return "\n".join(form.format(*line).rstrip() for line in lines)

    def write(self, path: Path) -> None:
        """Write ``path``.md, .csv and .tex; the first has title and notes if there are notes."""
        text = self.to_markdown()
        if self.notes:
            text = "\n\n".join([self.title, text, "\n".join(f"- {note}" for note in self.notes)])
        write_text(path.with_name(f"{path.name}.md"), text + "\n")
        write_text(path.with_name(f"{path.name}.csv"), self.to_csv())
        write_text(path.with_name(f"{path.name}.tex"), self.to_latex(path.name))


class _Formatter(string.Formatter):
    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get(str(key)) is None:
            raise KeyError(key)
        return kwargs[str(key)]

    def format_field(self, value: Any, form: str) -> str:
        return p_value(value) if form == "p" else format(value, form)


def _shown(row: Mapping[str, Any], head: str, forms: str | Sequence[str]) -> str:
    formatter = _Formatter()
    for form in [forms] if isinstance(forms, str) else forms:
        try:
            if form.startswith(":"):
                return formatter.format_field(formatter.get_value(head, (), row), form[1:])
            return formatter.vformat(form, (), row)
        except KeyError:
            continue
    return "-"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "ε": r"$\varepsilon$",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
