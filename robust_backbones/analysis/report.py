"""One self-contained HTML page, tables and figures of a study, written from its records."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from robust_backbones.analysis.figures import Picture, class_figure, epsilon_figure, training_figure
from robust_backbones.analysis.study import (
    METHOD,
    RECORDS,
    TASKS,
    Experiment,
    Result,
    Run,
    display_rows,
    exact_rows,
    experiments,
    metric_name,
    results,
    write_records,
)
from robust_backbones.analysis.tables import (
    classification_rows,
    classifier_rows,
    csv_text,
    detector_robustness_rows,
    latex,
    markdown,
)
from robust_backbones.analysis.transfer_figures import Page, transfer_pages
from robust_backbones.runs.files import atomic_path

# Every text colour has a contrast of at least 4.5:1 on the colour behind it (WCAG 2.1, 1.4.3; a test computes them).
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #ffffff; color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; }
header, nav, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { border-top: 2px solid #595959; padding-top: 1rem; margin-top: 2.5rem; }
a { color: #0b4f8a; }
a:focus-visible, .scroll:focus-visible { outline: 3px solid #0b4f8a; outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 0.5rem; background: #ffffff; padding: 0.5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { border-bottom: 1px solid #8c8c8c; padding: 0.3rem 0.6rem; text-align: right; vertical-align: top; }
th { background: #eeeeee; color: #1a1a1a; }
td { white-space: nowrap; }
th:first-child, td:first-child, th.words, td.words { text-align: left; }
td.words { white-space: normal; min-width: 18rem; }
tr.paper td { background: #f6f1e4; color: #4a3b12; font-style: italic; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption, .notes { color: #404040; font-size: 0.9rem; }
@media print {
  body { font-size: 10pt; }
  nav, .skip { display: none; }
  .scroll { overflow: visible; }
  td, th { padding: 0.15rem 0.3rem; font-size: 7.5pt; }
  td, td.words { white-space: normal; min-width: 0; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
_MEDIA = {".svg": "image/svg+xml", ".jpg": "image/jpeg", ".png": "image/png"}


def write_report(
    runs: Sequence[Run], output: Path, *, title: str, pictures: Mapping[str, Sequence[Picture]] | None = None
) -> Path:
    """Write ``tables/*.{md,csv,tex}``, ``figures/*.{svg,png,csv}`` and ``report.html``; the path of the last.

    ``records.jsonl`` holds the runs' records, so that the report can be made again from its own folder.

    Args:
        pictures: slug of an experiment -> further pictures for its section.

    Raises:
        InputError: two runs are the same with different results.
    """
    sections = []
    tables = {}
    for experiment in experiments(runs):
        found = results(experiment)
        for result in found:
            _write_tables(result, output / "tables" / result.slug)
        drawn = [*_draw(experiment, output / "figures"), *(pictures or {}).get(experiment.slug, ())]
        sections.append((experiment, found, drawn))
    transfer = [run.record for run in runs if run.record.task == "transfer"]
    classifiers = [run.record for run in runs if run.record.task in ("pretrain", "robustness")]
    if transfer:
        tables["Classification transfer, how it was set"] = classification_rows(transfer)
    if classifiers:
        tables["Classifiers"] = classifier_rows(classifiers)
    if detectors := [run.record for run in runs if run.record.task == "detector_robustness"]:
        tables["Robustness of detectors"] = detector_robustness_rows(detectors)
    pages = transfer_pages(runs, output / "figures")
    for name, (heads, rows) in [*(item for one in pages for item in one.tables.items()), *tables.items()]:
        path = output / "tables" / name.lower().replace(",", "").replace(" ", "_").replace("ε", "epsilon")
        _write(path.with_suffix(".md"), markdown(heads, rows) + "\n")
        _write(path.with_suffix(".csv"), csv_text(heads, rows))
        _write(path.with_suffix(".tex"), latex(heads, rows, caption=name, label=path.name, notes=()))
    write_records(runs, output / RECORDS)
    page = output / "report.html"
    _write(page, "\n".join(_page(title, runs, sections, pages, tables)) + "\n")
    return page


def summary(results: Sequence[Result]) -> list[str]:
    """What the comparisons of headline metrics say, an entry a metric of an experiment."""
    return [_said(result) for result in results if result.metric in result.experiment.headlines]


def _said(result: Result) -> str:
    compared = [(row.backbone, row.comparison) for row in result.rows if row.comparison is not None]
    if not compared:
        why = "there is nothing to compare" if len(result.rows) < 2 else "there is no single standard backbone"
        return f"{result.title}: not compared, because {why}."
    parts = []
    for verdict in ("better", "worse", "not distinguishable"):
        named = [f"{b.trained_at} ({c.difference:+.2f})" for b, c in compared if c.verdict == verdict]
        if named:
            parts.append(
                f"{verdict}{' than' if verdict != 'not distinguishable' else ' from'} standard: {', '.join(named)}"
            )
    untested = {c.reason: None for _, c in compared if c.reason}
    if untested:
        parts.append(f"not tested, because {'; '.join(untested)}")
    text = f"{result.title}: {'; '.join(parts)}."
    if all(c.verdict == "not distinguishable" for _, c in compared):
        text += " Nothing stands after correction; with few seeds that does not mean that there is no difference."
    return text


def _draw(experiment: Experiment, folder: Path) -> list[Picture]:
    drawn: list[Picture | None] = []
    for metric in experiment.headlines:
        stem = f"{experiment.slug}_{metric.replace('/', '_')}"
        drawn.append(epsilon_figure(experiment, metric, folder / f"{stem}_epsilon"))
        drawn.append(training_figure(experiment, metric, folder / f"{stem}_training"))
        if metric.endswith("/AP"):
            drawn.append(class_figure(experiment, metric.removesuffix("/AP"), folder / f"{stem}_classes"))
    if experiment.headlines:
        drawn.append(training_figure(experiment, "total_loss", folder / f"{experiment.slug}_loss"))
    return [picture for picture in drawn if picture is not None]


def _write_tables(result: Result, path: Path) -> None:
    heads, rows = display_rows(result)
    notes = [*result.notes, *result.experiment.remarks, METHOD]
    listed = "\n".join(f"- {note}" for note in notes)
    _write(path.with_name(path.name + ".md"), f"{result.title}\n\n{markdown(heads, rows)}\n\n{listed}\n")
    _write(path.with_name(path.name + ".csv"), csv_text(*exact_rows(result)))
    _write(path.with_name(path.name + ".tex"), latex(heads, rows, caption=result.title, label=result.slug, notes=notes))


def _page(
    title: str,
    runs: Sequence[Run],
    sections: Sequence[tuple[Experiment, Sequence[Result], Sequence[Picture]]],
    pages: Sequence[Page],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> Iterator[str]:
    counts = Counter(run.record.task for run in runs)
    records = ", ".join(f"{count} of {task}" for task, count in sorted(counts.items()))
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield '<a class="skip" href="#main">Skip to the results</a>'
    yield f"<header>\n<h1>{escape(title)}</h1>"
    yield f"<p>Every number below comes from {len(runs)} records of runs: {escape(records)}.</p>\n</header>"
    names = [
        "Summary",
        *(e.title for e, _, _ in sections),
        *(p.title for p in pages),
        *tables,
        "How to read the numbers",
        "Runs",
    ]
    links = "".join(f'<li><a href="#s{i}">{escape(name)}</a></li>' for i, name in enumerate(names))
    yield f'<nav aria-label="Contents">\n<ul>{links}</ul>\n</nav>\n<main id="main" tabindex="-1">'

    number = iter(range(len(names)))
    yield from _section(next(number), "Summary", _list(_summary_lines(sections)))
    for experiment, found, pictures in sections:
        yield from _section(next(number), experiment.title, _experiment(experiment, found, pictures))
    for one in pages:
        content = [*_figures(one.pictures), *(_table(name, *table) for name, table in one.tables.items())]
        yield from _section(next(number), one.title, content)
    for name, (heads, rows) in tables.items():
        yield from _section(next(number), name, [_table(name, heads, rows)])
    text = f"<p>{escape(METHOD)}</p><p>AP and accuracies are 0 to 100; “-” is a value that does not exist.</p>"
    yield from _section(next(number), "How to read the numbers", [text])
    yield from _section(
        next(number), "Runs", [_table("The records, and the source that made them", *_provenance(runs))]
    )
    yield "</main>\n<footer><p>Made by robust-backbones, tools/make_report.py.</p></footer>\n</body>\n</html>"


def _summary_lines(sections: Sequence[tuple[Experiment, Sequence[Result], Sequence[Picture]]]) -> list[str]:
    lines = summary([result for _, found, _ in sections for result in found])
    return lines or ["No record is of a task whose backbones are compared: " + ", ".join(TASKS) + "."]


def _section(number: int, name: str, content: Sequence[str] | Iterator[str]) -> Iterator[str]:
    yield f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{escape(name)}</h2>'
    yield from content
    yield "</section>"


def _experiment(experiment: Experiment, found: Sequence[Result], pictures: Sequence[Picture]) -> Iterator[str]:
    if experiment.remarks:
        yield from _list(experiment.remarks)
    if not found:
        yield "<p>No run has a value of a metric that is reported.</p>"
    headlines = [result for result in found if result.metric in experiment.headlines]
    for result in headlines:
        yield from _result(result)
    if pictures:
        yield "<h3>Figures</h3>"
    yield from _figures(pictures)
    for result in found:
        if result not in headlines:
            yield from _result(result)


def _figures(pictures: Sequence[Picture]) -> Iterator[str]:
    for picture in pictures:
        data = base64.b64encode(picture.file.read_bytes()).decode()
        source = f"data:{_MEDIA[picture.file.suffix]};base64,{data}"
        yield f'<figure>\n<img src="{source}" alt="{escape(picture.alt)}">'
        yield f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"


def _result(result: Result) -> Iterator[str]:
    name = metric_name(result.metric)
    yield f"<h3>{escape(name[0].upper() + name[1:])}</h3>"
    yield _table(result.title, *display_rows(result))
    if result.notes:
        yield from _list(result.notes)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls within itself on a narrow screen, by keyboard too."""

    def line(cells: Sequence[str], tag: str) -> str:
        words = [' class="words"' if head == "in words" else "" for head in heads]
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(f"<{tag}{scope}{w}>{escape(c)}</{tag}>" for c, w in zip(cells, words, strict=True))

    marks = [' class="paper"' if row[0].startswith("paper: ") else "" for row in rows]
    body = "\n".join(f"<tr{mark}>{line(row, 'td')}</tr>" for row, mark in zip(rows, marks, strict=True))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{line(heads, 'th')}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _list(items: Sequence[str]) -> list[str]:
    return ["<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"]


def _provenance(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    heads = ["run", "task", "data set", "trained at", "seed", "minutes", "commit", "torch"]
    rows = []
    for run in runs:
        record = run.record
        commit = (record.git_commit or "-")[:10] + ("+" if (record.git_commit or "").endswith("+") else "")
        rows.append([record.run_id, record.task, record.dataset, str(record.threat_model or "unknown")])
        rows[-1] += [str(record.seed), f"{record.seconds / 60:.1f}", commit, record.versions.get("torch", "-")]
    return heads, rows


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
