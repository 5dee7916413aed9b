"""One self-contained HTML page, tables and figures of a study, written from its records."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from robust_backbones.analysis.experiments import TASKS, Experiment, experiments, metric_name
from robust_backbones.analysis.figures import Page, Picture
from robust_backbones.analysis.inheritance import inheritance_pages
from robust_backbones.analysis.paper.transfer_figures import transfer_pages
from robust_backbones.analysis.paper.transfer_results import name_stand_ins
from robust_backbones.analysis.record_tables import provenance_table, record_tables
from robust_backbones.analysis.records import PRIMARY, RECORDS, Primary, RecordedRun, write_records
from robust_backbones.analysis.results import METHOD, Answer, Result, answers, results
from robust_backbones.analysis.study_figures import figure_4, study_figures
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.files import write_text
from robust_backbones.transfer.inheritance.matrix import matrices_of

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
    primary: Primary | None = None,
) -> Path:
    """Write ``tables/*.{md,csv,tex}``, ``figures/*.{svg,png,csv}`` and ``report.html``; the path of the last.

    ``records.jsonl`` has the runs' records, so that the report can be made again from its own folder.

    Args:
        pictures: slug of an experiment -> further pictures for its section.
        primary: the comparison that was declared before the runs.

    Raises:
        InputError: two equal runs have different results, or a record lacks what its tables need.
    """
    check_complete(runs)
    output = Path(output)
    read, runs = runs, name_stand_ins(runs)
    records = [run.record for run in runs]
    sections: Sections = {}
    compared = experiments(runs)
    found = results(*compared, primary=primary)
    for experiment in compared:
        own = [result for result in found if result.experiment is experiment]
        for result in own:
            result.table.write(output / "tables" / result.slug)
        drawn = [*study_figures(experiment, output / "figures"), *(pictures or {}).get(experiment.slug, ())]
        sections[experiment.title] = [*_experiment(experiment, own, drawn)]
    inherited = inheritance_pages(runs, output / "figures")
    overview = figure_4(compared, output / "figures" / "figure_4")
    pages = [Page("AP against ε (figure 4)", [overview], [])] if overview else []
    pages += [*transfer_pages(runs, output / "figures"), *(page for _, page in inherited)]
    pages += [Page(table.title, [], [table]) for table in record_tables(records)]
    for page in pages:
        for table in page.tables:
            name = table.title.lower().replace(",", "").replace(" ", "_").replace("ε", "epsilon")
            table.write(output / "tables" / name)
        sections[page.title] = [*_figures(page.pictures), *(table.to_html() for table in page.tables)]
    write_records(read, output / RECORDS)
    if primary:
        primary.write(output / PRIMARY)
    missing = f"Missing for an answer: no record is of a task whose backbones are compared: {', '.join(TASKS)}."
    nothing = [Answer(title, "Not compared", missing)]
    answered = [*answers(found), *(answer for answer, _ in inherited)] or nothing
    summary = [line for answer in answered for line in _answer(answer)]
    runs_table = ["<details><summary>All records</summary>", provenance_table(records).to_html(), "</details>"]
    said = " ".join(line for lines in (sections, summary, *sections.values(), runs_table) for line in lines)
    sections["How to read the numbers"] = [f"<p>{escape(METHOD)}</p>", *_glossary(said)]
    sections["Runs"] = runs_table
    counts = Counter(record.task for record in records)
    introduction = f"Every number below comes from {plural(len(runs), 'record')} of runs: "
    introduction += ", ".join(f"{count} of {task}" for task, count in sorted(counts.items())) + "."
    html = _page(title, introduction, {"Answers": summary, **sections})
    write_text(output / "report.html", "\n".join(html) + "\n")
    return output / "report.html"


def check_complete(runs: Sequence[RecordedRun]) -> None:
    """Raise InputError for a record that lacks what its tables need, by making each from it alone."""
    for run in runs:
        try:
            results(*experiments(name_stand_ins([run])))
            for table in (provenance_table([run.record]), *record_tables([run.record])):
                table.to_text()
            if run.record.task == "inheritance":
                matrices_of("", {run.place: run.record})
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"the record in {run.place} cannot be put into a table ({error!r}): remove it, or make its run again"
            ) from error


def _page(title: str, introduction: str, sections: Sections) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield '<a class="skip" href="#main">Skip to the results</a>'
    yield f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n</header>"
    links = "".join(f'<li><a href="#s{i}">{escape(name)}</a></li>' for i, name in enumerate(sections))
    contents = f"<details><summary>Contents</summary><ul>{links}</ul></details>"
    yield f'<nav aria-label="Contents">\n{contents}\n</nav>\n<main id="main" tabindex="-1">'
    for number, (name, content) in enumerate(sections.items()):
        yield f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{escape(name)}</h2>'
        yield from content
        yield "</section>"
    yield "</main>\n<footer><p>Made by robust-backbones report.</p></footer>\n</body>\n</html>"


def _answer(answer: Answer) -> Iterator[str]:
    yield f'<div class="answer"><h3>{escape(answer.question)}</h3>'
    yield f"<p><strong>{escape(answer.verdict)}.</strong> {escape(answer.sentence)}</p>"
    if answer.details:
        yield f"<details><summary>Result by result</summary>{_list(answer.details)}</details>"
    yield "</div>"


GLOSSARY = {
    r"standard": "Standard: pre-trained without an adversary (ε = 0). Robust: pre-trained against one (ε > 0).",
    r"ε": "ε: radius of the ball of perturbations that a backbone was trained against, of pixels in [0, 1].",
    r"L2:": "L2:3: perturbations of ℓ2 norm up to ε = 3; L2:0 is standard training.",
    r"Linf:": "Linf:4/255: perturbations of each pixel value by up to ε = 4/255.",
    r"\bAP\b": "AP: average precision (0-100), averaged over classes and IoU thresholds 0.50 to 0.95, as COCO has it.",
    r"AP(50|75)": "AP50, AP75: AP at the single IoU threshold 0.50 or 0.75.",
    r"\bbbox\b|\bbox\b": "box, bbox: of bounding boxes.",
    r"\bsegm\b|\bmask\b": "mask, segm: of instance masks.",
    r"accuracy|acc\b": "Accuracy: share of images classified rightly (0-100); robust accuracy is that under attack.",
    r"\bP\b|mPC|rPC": "P: AP on clean images. mPC: mean AP over corruptions and severities. rPC: mPC / P, in percent.",
    r"PGD": "PGD-10: projected gradient descent, an attack of 10 steps.",
    r"APGD": "APGD: PGD whose step size adapts itself.",
    r"AutoAttack": "AutoAttack: an ensemble of attacks without parameters (Croce & Hein 2020).",
    r"worst": "Worst (of 2): for each image, of two attacks the one that leaves it the lower AP.",
    r"free Linf|free L2": "free: fine-tuned adversarially, with the gradients of training used for the attack, too.",
    r"d_z": "d_z: mean of the paired differences over their standard deviation.",
    r"Holm": "p (Holm): p value after Holm's correction for all exploratory tests of the report.",
    r"±": "±: sample standard deviation over seeds.",
    r"R²": "R²: share of variance that a line explains.",
    r"\bm?RI\b": "RI: mean change of accuracy on the other sets by fine-tuning on one; mRI: its mean over all sets.",
    r"Spearman": "Spearman: correlation of ranks.",
    r"OTDD": "OTDD: distance between two labelled sets' features as distributions (Alvarez-Melis & Fusi 2020).",
    r"Wasserstein": "2-Wasserstein: distance between two sets' features as distributions.",
    r"wise_ft": "wise_ft: mean of the weights before and after fine-tuning (Wortsman et al. 2022).",
    r"\blwf\b": "lwf: learning without forgetting (Li & Hoiem 2016).",
    r"WRN": "WRN-50-2: Wide ResNet-50, twice as wide.",
    r"[Ff]ixed-feature|linear.probe": "Fixed-feature transfer, linear probe: only a new last layer is trained.",
    r"[Ff]ull.network": "Full-network transfer: all layers are fine-tuned.",
    r"held_out": "held_out: the setting was chosen on images held out of the training set.",
    r"downscale": "downscale: images are reduced to so many pixels and enlarged again; 0 is not at all.",
    r"FREEZE_AT": "MODEL.BACKBONE.FREEZE_AT: how many first stages of the backbone are not fine-tuned.",
    r"AMP": "SOLVER.AMP.ENABLED: whether training is in mixed precision.",
    r"[Ss]ync(BN|bn)": "SyncBN: batch norm whose statistics are over all GPUs.",
    r"†": "†: a run with another version of some library than most runs have.",
    r"\bn\b": "n: number of seeds, or of points of a line.",
    r">-<": "-: a value that does not exist.",
}
"""Pattern of a term -> its meaning; a page explains the terms that occur in it."""


def _glossary(text: str) -> Iterator[str]:
    """The terms of a page, explained."""
    plain = re.sub(r"data:[^\"]*", "", text)
    terms = [meaning.split(": ", 1) for pattern, meaning in GLOSSARY.items() if re.search(pattern, plain)]
    yield "<dl>" + "".join(f"<dt>{escape(term)}</dt> <dd>{escape(told)}</dd>" for term, told in terms) + "</dl>"


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
