r"""Make tables, figures and one self-contained report.html from the records of runs.

Examples:
    robust-backbones report runs/study --output report
    robust-backbones report runs/voc_standard runs/voc_robust --output report --pictures 4

Every record.json and records.jsonl in the folders and their subfolders is read. Runs that differ only in backbone and
seed are compared: mean, spread and interval over seeds, paired tests against the standard backbone with Holm's
correction over the whole report, effect size, and a sentence each. The comparison that a study's manifest declares as
`primary`
is tested alone. OUTPUT gets report.html, tables/*.{md,csv,tex} and figures/*.{svg,png,csv}.
--pictures N also draws the detections of the standard and the best robust detector in the first N test images; this
needs Detectron2, the runs' weights, and DETECTRON2_DATASETS as in training.
Exit status: 0 done, 2 bad input. --debug shows tracebacks.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from robust_backbones.analysis.experiments import Experiment, experiments
from robust_backbones.analysis.figures import Picture
from robust_backbones.analysis.records import find_primary, find_runs
from robust_backbones.analysis.report import write_report
from robust_backbones.commands import cli
from robust_backbones.errors import InputError, plural


@dataclass
class Arguments:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs; a record.json or a report's records.jsonl."""
    output: Path
    """Folder for the report."""
    title: str = "Do robust backbones transfer better?"
    """Heading of the page."""
    pictures: int = 0
    """Number of test images of each experiment with detections drawn side by side."""


def main(arguments: list[str]) -> int:
    options: Arguments = cli.parse(Arguments, arguments, description=__doc__)
    if not options.runs:
        raise InputError("give one or more folders of runs")
    if options.pictures < 0:
        raise InputError(f"--pictures must be >= 0, got {options.pictures}")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"{options.output} is not a folder: choose another --output")
    runs, before = find_runs(options.runs), files_in(options.output)
    pictures = {}
    if options.pictures:
        for experiment in experiments(runs):
            if (picture := draw(experiment, options.output / "figures", options.pictures)) is not None:
                pictures[experiment.slug] = [picture]
        if not pictures:
            print("no pictures: none of these experiments has a standard and a robust detector")
    page = write_report(
        runs, options.output, title=options.title, pictures=pictures, primary=find_primary(options.runs)
    )
    print(f"report of {plural(len(runs), 'record')}: {page}; tables and figures are beside it")
    if left := before & files_in(options.output):
        print(
            f"not of this report, to be removed: {plural(len(left), 'file')} of tables/ and figures/, as {min(left)[0]}"
        )
    return 0


def files_in(output: Path) -> set[tuple[str, int, int]]:
    """Tables and figures, by name, with what a new one of the same name would change."""
    paths = [*output.glob("tables/*"), *output.glob("figures/*")]
    return {(path.name, (status := path.stat()).st_ino, status.st_mtime_ns) for path in paths}


def draw(experiment: Experiment, folder: Path, images: int) -> Picture | None:
    """Detections of the standard and the best robust backbone, of one seed; None where there are no two detectors."""
    if experiment.task not in ("detection", "segmentation") or not experiment.headlines:
        return None
    metric = experiment.headlines[-1]  # of masks where there are some
    robust = [one for one in experiment.robust if one.values(metric) and experiment.reference(one)]
    if not robust:
        return None
    best = max(robust, key=lambda backbone: fmean(backbone.values(metric).values()))
    standard = experiment.reference(best)
    assert standard is not None
    chosen = {b.trained_at: b.runs[min(b.runs)] for b in (standard, best)}
    for run in chosen.values():
        if not (run.folder / "model_final.pth").is_file():
            raise InputError(
                f"{run.place} has no model_final.pth to draw with, as after `sweep unpack` or from a records.jsonl: "
                "leave --pictures out, or give it where the detectors were trained"
            )

    from robust_backbones.detection.visualize import draw_side_by_side

    file = folder / f"{experiment.slug}_detections.jpg"
    draw_side_by_side({name: run.folder for name, run in chosen.items()}, file, images=images)
    seeds = ", ".join(f"{name} seed {run.record.seed}" for name, run in chosen.items())
    return Picture(
        file,
        f"{experiment.title}: ground truth and detections in the first {plural(images, 'test image')}, score >= 0.5 "
        f"({seeds}; {best.trained_at} has the highest mean of the robust backbones). Single images prove nothing.",
        f"Rows of test images: ground truth, detections from the backbone trained at {' and at '.join(chosen)}.",
    )
