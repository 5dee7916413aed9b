"""What an experiment says: one table a metric, with the standard backbone compared, and the summary in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robust_backbones.analysis.experiments import BackboneRuns, Experiment, metric_name
from robust_backbones.analysis.paper.values import PaperResult, differences_to_paper, paper_result
from robust_backbones.analysis.statistics import Comparison, Summary, compare
from robust_backbones.analysis.tables import Table

METHOD = (
    "Means, sample standard deviations (n - 1) and 95 % t intervals are over seeds. Tests are two-sided paired t tests "
    "by seed against the standard backbone; p is after Holm's correction over the tests of one table, and below 0.05 a "
    "backbone is called better or worse. Intervals of differences are of one comparison each, not corrected. d_z is "
    "the mean of the paired differences over their standard deviation (Cohen 1988). The seeds needed give 80 % power "
    "at the observed effect and the strictest corrected level; from few seeds that effect is itself uncertain, and so "
    "is their number."
)
COLUMNS = {
    "backbone": "{_name}",
    "trained at": "{trained_at}",
    "n": ":",
    "mean ± std": ("{mean:.2f} ± {std:.2f}", "{mean:.2f}"),
    "95 % interval": "{low:.2f} to {high:.2f}",
    "difference (95 %)": (
        "{difference:+.2f} ({difference_low:+.2f} to {difference_high:+.2f})",
        "{difference:+.2f}",
    ),
    "p (Holm)": "{p_holm:p}",
    "d_z": ":+.2f",
    "in words": "{_words}",
}


@dataclass(frozen=True)
class Row:
    """A backbone in a table; ``comparison`` is with the standard backbone, None for that itself and without one."""

    backbone: BackboneRuns
    summary: Summary | None
    comparison: Comparison | None
    sentence: str


@dataclass(frozen=True)
class Result:
    """One metric of an experiment: a row a backbone, the paper's values where it has some, and what to know of both."""

    experiment: Experiment
    metric: str
    rows: tuple[Row, ...]
    paper: PaperResult | None
    paper_differences: tuple[str, ...]
    """Why the paper's values do not compare with ours; empty where nothing is known to differ."""

    @property
    def title(self) -> str:
        return f"{self.experiment.title}: {metric_name(self.metric)}"

    @property
    def slug(self) -> str:
        return f"{self.experiment.slug}_{re.sub(r'[^a-zA-Z0-9]+', '_', self.metric)}"

    @property
    def notes(self) -> list[str]:
        """What to know beside ``experiment.remarks``: values that are missing, and how the paper's were made."""
        notes = []
        for row in self.rows:
            missing = sorted(row.backbone.runs.keys() - row.backbone.values(self.metric).keys())
            if missing:
                notes.append(
                    f"{row.backbone.name} trained at {row.backbone.trained_at} has no {metric_name(self.metric)} for "
                    f"seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}: these count nowhere."
                )
        if self.paper and self.paper_differences:
            differences = "; ".join(self.paper_differences)
            notes.append(f"The paper's values ({self.paper.source}) are not comparable with ours: {differences}.")
        elif self.paper:
            notes.append(
                f"The paper's values ({self.paper.source}) are of the same data, architecture and schedule "
                f"({self.paper.schedule}), as far as is known."
            )
        return notes

    @property
    def table(self) -> Table:
        """A row a backbone; below them the paper's."""
        rows = [self._values(row) for row in self.rows]
        if self.paper:
            words = "The paper's value, not ours"
            words += "; not comparable, see the notes." if self.paper_differences else "."
            for name, value in (("standard", self.paper.standard), ("best robust", self.paper.robust)):
                origin = {"origin": "paper", "backbone": "resnet50", "sentence": self.paper.source}
                rows.append({**origin, "_name": f"paper: {name}", "_words": words, **asdict(value)})
        return Table(self.title, rows, COLUMNS, [*self.notes, *self.experiment.remarks, METHOD])

    def _values(self, row: Row) -> dict[str, Any]:
        values, c = row.backbone.values(self.metric), row.comparison
        name = row.backbone.name
        found: dict[str, Any] = {"origin": "ours", "backbone": name, "trained_at": row.backbone.trained_at}
        found |= {"n": len(values), "seeds": " ".join(map(str, values)), "values": " ".join(map(repr, values.values()))}
        found |= asdict(row.summary) if row.summary else dict.fromkeys(("mean", "std", "low", "high"))
        found |= {"paired_seeds": " ".join(map(str, c.seeds)) if c else None}
        found |= {
            "difference": c and c.difference,
            "difference_low": c and c.low,
            "difference_high": c and c.high,
            "p": c and c.p,
            "p_holm": c and c.p_holm,
            "d_z": c and c.effect,
            "seeds_needed": c and c.seeds_needed,
            "verdict": c and c.verdict,
            "sentence": row.sentence,
        }
        return {**found, "_name": name + "†" * self.experiment.is_odd(row.backbone), "_words": row.sentence}


def results(experiment: Experiment) -> list[Result]:
    """A result for each metric of an experiment that gets a table."""
    return [_result(experiment, metric) for metric in experiment.metrics]


def _result(experiment: Experiment, metric: str) -> Result:
    standard = experiment.standard
    comparisons: dict[int, Comparison] = {}
    if standard is not None:
        others = {i: b.values(metric) for i, b in enumerate(experiment.backbones) if b is not standard}
        comparisons = compare(standard.values(metric), others)
    several = any(backbone.is_standard for backbone in experiment.backbones)
    rows = []
    for index, backbone in enumerate(experiment.backbones):
        comparison = comparisons.get(index)
        if comparison is not None:
            sentence = comparison.sentence
        elif backbone is standard:
            sentence = "The standard backbone, with which the others are compared."
        else:
            sentence = f"Not compared: there is {'more than one' if several else 'no'} standard backbone."
        rows.append(Row(backbone, backbone.summary(metric), comparison, sentence))
    record = experiment.runs[0].record
    paper = paper_result(record, metric)
    return Result(experiment, metric, tuple(rows), paper, tuple(differences_to_paper(record, paper) if paper else ()))


def summary(results: Sequence[Result]) -> list[str]:
    """What the comparisons of headline metrics say, an entry a metric of an experiment."""
    return [_conclusion(result) for result in results if result.metric in result.experiment.headlines]


def _conclusion(result: Result) -> str:
    compared = [(row.backbone, row.comparison) for row in result.rows if row.comparison is not None]
    if not compared:
        why = "there is nothing to compare" if len(result.rows) < 2 else "there is no single standard backbone"
        return f"{result.title}: not compared, because {why}."
    parts = []
    for verdict, words in (("better", "better than"), ("worse", "worse than"), (ALIKE, f"{ALIKE} from")):
        named = [f"{b.trained_at} ({c.difference:+.2f})" for b, c in compared if c.verdict == verdict]
        if named:
            parts.append(f"{words} standard: {', '.join(named)}")
    untested = dict.fromkeys(c.reason for _, c in compared if c.reason)
    if untested:
        parts.append(f"not tested, because {'; '.join(untested)}")
    text = f"{result.title}: {'; '.join(parts)}."
    if all(c.verdict == ALIKE for _, c in compared):
        text += " Nothing stands after correction; with few seeds that does not mean that there is no difference."
    return text


ALIKE = "not distinguishable"
