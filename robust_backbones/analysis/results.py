"""The results of an experiment: one table per metric, comparisons to the standard backbone, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from robust_backbones.analysis.experiments import BackboneRuns, Experiment, bounds, metric_name
from robust_backbones.analysis.paper.values import PaperResult, differences_to_paper, paper_result
from robust_backbones.analysis.records import Primary
from robust_backbones.analysis.statistics import Comparison, Summary, compare_pairs, corrected
from robust_backbones.analysis.tables import Table

METHOD = (
    "Means, sample standard deviations (n - 1) and 95 % t intervals are over seeds; intervals end where no value can "
    "be. Tests are two-sided paired t tests by seed against the standard backbone of the same architecture and "
    "pre-training. A comparison that the study declared beforehand is primary, and tested alone; all others are "
    "exploratory, and their p is after Holm's correction over all exploratory tests of the report's tables "
    "(those of mRI are a family of their own): where no backbone is different, the chance that any is called so is at "
    "most 0.05. Below 0.05 a backbone is called better or worse. Intervals of differences are of one comparison each, "
    "not corrected. d_z is the mean of the "
    "paired differences over their standard deviation (Cohen 1988). The seeds needed give 80 % power at the observed "
    "effect and the strictest corrected level; from few seeds that effect is itself uncertain, and so is their number."
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
    """A backbone in a table; ``comparison`` is with the standard backbone, None for that itself or without one."""

    backbone: BackboneRuns
    summary: Summary | None
    comparison: Comparison | None
    sentence: str
    is_primary: bool = False
    """Whether its comparison was declared before the runs."""


@dataclass(frozen=True)
class Result:
    """One metric of an experiment: one row per backbone, the paper's values if it has some, and notes on both."""

    experiment: Experiment
    metric: str
    rows: tuple[Row, ...]
    paper: PaperResult | None
    paper_differences: tuple[str, ...]
    """Why the paper's values do not compare with ours; empty if no difference is known."""

    @property
    def title(self) -> str:
        return f"{self.experiment.title}: {metric_name(self.metric)}"

    @property
    def slug(self) -> str:
        return f"{self.experiment.slug}_{self.metric.replace('/', '_')}"

    @property
    def notes(self) -> list[str]:
        """Notes in addition to ``experiment.remarks``: missing values, and how the paper's were obtained."""
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
        """One row per backbone; below them the paper's."""
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
            "primary": row.is_primary,
        }
        return {**found, "_name": name + "†" * self.experiment.is_odd(row.backbone), "_words": row.sentence}


def results(*found: Experiment, primary: Primary | None = None) -> list[Result]:
    """A result for each metric that gets a table, for experiments that are reported together.

    All their tests are one family for Holm's correction, except the primary comparison, which is tested alone.
    """
    own = [_result(experiment, metric, primary) for experiment in found for metric in experiment.metrics]
    places = [(i, j) for i, result in enumerate(own) for j in range(len(result.rows))]
    family = corrected(
        {(i, j): c for i, j in places if (c := own[i].rows[j].comparison) and not own[i].rows[j].is_primary}
    )
    rows = [list(result.rows) for result in own]
    for (i, j), comparison in family.items():
        rows[i][j] = replace(rows[i][j], comparison=comparison, sentence=comparison.sentence)
    return [replace(result, rows=tuple(changed)) for result, changed in zip(own, rows, strict=True)]


def _result(experiment: Experiment, metric: str, primary: Primary | None) -> Result:
    references = {i: one for i, b in enumerate(experiment.backbones) if (one := experiment.reference(b))}
    pairs = {i: (one.values(metric), experiment.backbones[i].values(metric)) for i, one in references.items()}
    between = (-bounds(metric)[1], bounds(metric)[1])
    rows = []
    for index, backbone in enumerate(experiment.backbones):
        comparison = compare_pairs({0: pairs[index]}, bounds=between)[0] if index in pairs else None
        is_primary = comparison is not None and primary is not None and primary.names(metric, backbone.runs.values())
        if comparison is not None:
            sentence = f"Primary comparison, tested alone. {comparison.sentence}" if is_primary else comparison.sentence
        elif backbone.is_standard:
            sentence = "The standard backbone: those of its architecture and pre-training are compared with it."
        else:
            several = "more than one" if experiment.standards(backbone) else "no"
            sentence = f"Not compared: there is {several} standard backbone of its architecture and pre-training."
        rows.append(Row(backbone, backbone.summary(metric), comparison, sentence, is_primary))
    record = experiment.runs[0].record
    paper = paper_result(record, metric)
    return Result(experiment, metric, tuple(rows), paper, tuple(differences_to_paper(record, paper) if paper else ()))


@dataclass(frozen=True)
class Answer:
    """The answer of the records to the question of one task."""

    question: str
    verdict: str
    """In a few words: ``Better in 3 of 8``, ``Not distinguishable``, ``Not tested``, ``Not compared``."""
    sentence: str
    """The differences, by metric; what is missing if the question has no answer."""
    details: Sequence[str] = ()


def answers(found: Sequence[Result]) -> list[Answer]:
    """One answer per task, from the robust backbones' comparisons in headline metrics."""
    answered = []
    for task, question in QUESTIONS.items():
        own = [r for r in found if r.experiment.task == task and r.metric in r.experiment.headlines]
        compared: dict[str, list[Comparison | None]] = {}
        for result in own:
            if what := _measured(result):
                rows = [row for row in result.rows if row.backbone in result.experiment.robust]
                compared.setdefault(what, []).extend(row.comparison for row in rows)
        if own:
            verdict, sentence = conclude(compared)
            declared = [row for result in own for row in result.rows if row.is_primary]
            if declared:
                sentence = f"{' '.join(row.sentence for row in declared)} All else is exploratory. {sentence}"
            elif any(compared.values()):
                sentence += " All of it is exploratory: no comparison was declared before the runs."
            answered.append(Answer(question, verdict, sentence, [_conclusion(result) for result in own]))
    return answered


def _measured(result: Result) -> str:
    """The subject of a metric in words; empty if another metric of its experiment already says it."""
    cell, *rest = result.metric.split("/")
    if result.experiment.task != "detector_robustness" or len(rest) < 2:
        return metric_name("/".join(result.metric.split("/")[-2:]))
    if cell == "rPC":
        return ""
    cells = {"P": "on clean images", "mPC": "on corrupted images", "corrupted": "on corrupted images"}
    where = "under attack" if cell.startswith("attack") else cells.get(cell, "on other images")
    return f"{metric_name('/'.join(rest))} {where}"


def conclude(compared: Mapping[str, Sequence[Comparison | None]]) -> tuple[str, str]:
    """Verdict and sentence of comparisons with standard backbones.

    Args:
        compared: what was measured -> one comparison per robust backbone, None if it has no standard one.
    """
    seen = [one for ones in compared.values() for one in ones if one and one.difference is not None]
    if not seen:
        which = "no robust backbone" if not any(compared.values()) else "no standard backbone of the same architecture"
        return "Not compared", (
            f"Missing for an answer: there is {which}, evaluated in the same setting and with the same seeds as the "
            f"{'standard' if not any(compared.values()) else 'robust'} one."
        )
    counts = Counter(one.verdict for one in seen)
    told = [f"{name} in {counts[name]}" for name in ("better", "worse") if counts[name]]
    verdict = f"{', '.join(told)} of {len(seen)}" if told else ALIKE if counts[ALIKE] else "not tested"
    parts = []
    for what, ones in compared.items():
        differences = [one.difference for one in ones if one and one.difference is not None]
        if differences:
            low, high = (f"{reduce(differences):+z.2f}" for reduce in (min, max))
            own = Counter(one.verdict if one else "without a standard backbone" for one in ones)
            counted = ", ".join(f"{count} {name}" for name, count in own.items())
            parts.append(f"{what} {low if low == high else f'{low} to {high}'} ({counted})")
    sentence = f"Robust minus standard, in points: {'; '.join(parts)}."
    if not told and counts[ALIKE]:
        sentence += " Nothing stands after correction; with few seeds that does not mean that there is no difference."
    if reasons := {one.reason for one in seen if one.reason}:
        sentence += f" Missing for a test: {'; '.join(sorted(reasons))}."
    return verdict[0].upper() + verdict[1:], sentence


def _conclusion(result: Result) -> str:
    compared = [(row.backbone, row.comparison) for row in result.rows if row.comparison is not None]
    if not compared:
        why = "there is nothing to compare" if len(result.rows) < 2 else "there is no single standard backbone"
        return f"{result.title}: not compared, because {why}."
    parts = []
    for verdict in ("better", "worse", ALIKE, "not tested"):
        named = [
            f"{b.label} ({c.difference:+.2f}" + (f", {c.low:+.2f} to {c.high:+.2f})" if c.low is not None else ")")
            for b, c in compared
            if c.verdict == verdict and c.difference is not None
        ]
        if named:
            parts.append(f"{verdict}: {', '.join(named)}")
    untested = dict.fromkeys(c.reason for _, c in compared if c.reason)
    return f"{result.title}, against standard: {'; '.join(parts or ['not tested'])}" + (
        f" because {'; '.join(untested)}." if untested else "."
    )


ALIKE = "not distinguishable"
QUESTIONS = {
    "detection": "Do robust backbones give better detectors?",
    "segmentation": "Do robust backbones give better instance segmentation?",
    "transfer": "Do robust backbones classify better after transfer?",
    "detector_robustness": "Are detectors on robust backbones more robust?",
}
