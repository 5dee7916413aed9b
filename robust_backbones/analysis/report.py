"""One self-contained HTML page, tables and figures of a study, written from its records."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from robust_backbones.analysis.experiments import TASKS, Experiment, experiments, metric_name
from robust_backbones.analysis.figures import Picture
from robust_backbones.analysis.paper.transfer_figures import Page, transfer_pages
from robust_backbones.analysis.record_tables import provenance_table, record_tables
from robust_backbones.analysis.records import RECORDS, RecordedRun, write_records
from robust_backbones.analysis.results import METHOD, Result, results, summary
from robust_backbones.analysis.study_figures import study_figures
from robust_backbones.analysis.tables import write_text

# Every text colour has a contrast of at least 4.5:1 on the colour behind it (WCAG 2.1, 1.4.3; a test computes them).
STYLE = "\n" + Path(__file__).with_name("report.css").read_text()
_MEDIA = {".svg": "image/svg+xml", ".jpg": "image/jpeg", ".png": "image/png"}


Sections = dict[str, Sequence[str]]
"""Heading -> lines of HTML."""


def write_report(
    runs: Sequence[RecordedRun],
    output: str | Path,
    *,
    title: str,
    pictures: Mapping[str, Sequence[Picture]] | None = None,
) -> Path:
    """Write ``tables/*.{md,csv,tex}``, ``figures/*.{svg,png,csv}`` and ``report.html``; the path of the last.

    ``records.jsonl`` holds the runs' records, so that the report can be made again from its own folder.

    Args:
        pictures: slug of an experiment -> further pictures for its section.

    Raises:
        InputError: two runs are the same with different results.
    """
    output = Path(output)
    records = [run.record for run in runs]
    sections: Sections = {}
    found: list[Result] = []
    for experiment in experiments(runs):
        own = results(experiment)
        for result in own:
            result.table.write(output / "tables" / result.slug)
        drawn = [*study_figures(experiment, output / "figures"), *(pictures or {}).get(experiment.slug, ())]
        sections[experiment.title] = [*_experiment(experiment, own, drawn)]
        found += own
    pages = transfer_pages(runs, output / "figures")
    pages += [Page(table.title, [], [table]) for table in record_tables(records)]
    for page in pages:
        for table in page.tables:
            name = table.title.lower().replace(",", "").replace(" ", "_").replace("ε", "epsilon")
            table.write(output / "tables" / name)
        sections[page.title] = [*_figures(page.pictures), *(table.to_html() for table in page.tables)]
    write_records(runs, output / RECORDS)
    sections["How to read the numbers"] = [
        f"<p>{escape(METHOD)}</p><p>AP and accuracies are 0 to 100; “-” is a value that does not exist.</p>"
    ]
    sections["Runs"] = [provenance_table(records).to_html()]
    lines = summary(found) or ["No record is of a task whose backbones are compared: " + ", ".join(TASKS) + "."]
    counts = Counter(record.task for record in records)
    introduction = f"Every number below comes from {len(runs)} records of runs: "
    introduction += ", ".join(f"{count} of {task}" for task, count in sorted(counts.items())) + "."
    html = _page(title, introduction, {"Summary": [_list(lines)], **sections})
    write_text(output / "report.html", "\n".join(html) + "\n")
    return output / "report.html"


def _page(title: str, introduction: str, sections: Sections) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield '<a class="skip" href="#main">Skip to the results</a>'
    yield f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n</header>"
    links = "".join(f'<li><a href="#s{i}">{escape(name)}</a></li>' for i, name in enumerate(sections))
    yield f'<nav aria-label="Contents">\n<ul>{links}</ul>\n</nav>\n<main id="main" tabindex="-1">'
    for number, (name, content) in enumerate(sections.items()):
        yield f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{escape(name)}</h2>'
        yield from content
        yield "</section>"
    yield "</main>\n<footer><p>Made by robust-backbones report.</p></footer>\n</body>\n</html>"


def _experiment(experiment: Experiment, found: Sequence[Result], pictures: Sequence[Picture]) -> Iterator[str]:
    if experiment.remarks:
        yield _list(experiment.remarks)
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
    yield result.table.to_html()
    if result.notes:
        yield _list(result.notes)


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
