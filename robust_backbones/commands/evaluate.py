r"""Evaluate the robustness of a trained classifier or detector.

Example, a classifier's accuracy under PGD-20 and AutoAttack on 1000 images:
    robust-backbones evaluate classifier runs/r50_linf_eps4/checkpoint.pt --data imagenet/val \
        --threat-model Linf:4/255 --output runs/r50_linf_eps4_robustness --limit 1000

Example, a detector's AP under the 15 common corruptions:
    robust-backbones evaluate detector runs/voc_robust/config.yaml runs/voc_robust/model_final.pth \
        --output runs/voc_robust_robustness

Example, under attacks on two losses, with the worse one for each image, on 500 images in 2 processes:
    robust-backbones evaluate detector runs/voc_robust/config.yaml runs/voc_robust/model_final.pth \
        --corruptions none --attacks classification localization --threat-model Linf:4/255 --limit 500 --jobs 2 \
        --output runs/voc_robust_attacked

`robust-backbones evaluate classifier --help` and `... detector --help` list all options. --debug shows tracebacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from robust_backbones.analysis.tables import Table
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.compute import available
from robust_backbones.classification.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.commands import cli
from robust_backbones.commands.options import DeviceOptions, EvaluationOptions
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES
from robust_backbones.errors import InputError, TrainingFailedError, plural
from robust_backbones.runs.files import write_json
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

if TYPE_CHECKING:
    from robust_backbones.detection.cell_images import ImageChoice
    from robust_backbones.detection.cells import Cell


@dataclass(kw_only=True)
class ClassifierOptions(EvaluationOptions):
    """Clean, PGD and AutoAttack accuracy of a classifier, each with its 95 % interval.

    OUTPUT gets outcomes.jsonl (a row per image) and record.json; the same command resumes an interrupted evaluation.
    """

    config: Annotated[RobustnessConfig, tyro.conf.arg(name="")]
    expected: float | None = None
    """Clean accuracy in percent, such as a published one: exit status 1 if the 95 % interval does not contain it."""


EXPECTED = "expected.json"
"""File in OUTPUT that says that an accuracy was as expected."""


@dataclass(kw_only=True)
class DetectorOptions(DeviceOptions):
    """Clean AP of a trained detector, its AP on corrupted images (P, mPC, rPC), in other domains and under attack.

    DETECTRON2_DATASETS names the folder with the data sets. OUTPUT gets cells/NAME/record.json and detections.json for
    every evaluation (clean, fog-3, ...), record.json over all, and errors.svg, .png and .csv: the AP50 that each type
    of error costs. Finished cells are not run again, so an interrupted evaluation resumes, and cells can be added
    later. Attacks are compared with random noise and larger balls on 8 images; signs of gradient masking are printed.
    Exit status: 0 done, 1 failed, 2 bad input, 75 stopped by a signal.
    """

    config: tyro.conf.Positional[Path]
    """The detector's configuration, such as its run's config.yaml."""
    weights: tyro.conf.Positional[Path]
    """The detector, such as its run's model_final.pth."""
    output: Path
    """Folder for the results."""
    corruptions: tuple[str, ...] = ("all",)
    """all (the 15 of Hendrycks & Dietterich 2019), none, or names such as gaussian_noise fog."""
    severities: tuple[int, ...] = SEVERITIES
    """1 to 5; 0 is the unchanged image. mPC needs all five of all 15."""
    domains: Path | None = None
    """Folder with one folder per domain, each with images and an annotation file in COCO's format, as in COCO-O."""
    attacks: tuple[str, ...] = ()
    """Losses that a white-box adversary maximises, one cell each: classification localization objectness mask total."""
    threat_model: ThreatModel | None = None
    """The adversary's ball, around the image as the detector sees it, in [0, 1] pixel units."""
    attack_steps: int = 10
    attack_restarts: int = 1
    attack_schedule: Literal["fixed", "apgd"] = "fixed"
    attack_target: int | Literal["derangement"] | None = None
    """Instead of --attacks: have every object classified as this class (from 0), or each class as another one."""
    errors: tuple[str, ...] = ()
    """Cells whose error types are drawn, such as clean fog-3 attack-worst; by default clean, domains and attacks."""
    limit: int | None = None
    """Number of annotated images; a larger limit takes the same ones and more."""
    seed: int = 0
    """Of the corruptions and of the choice of --limit."""
    allow_unverified_detector: bool = False
    """Accept a detector of plain Detectron2, with the configuration's preprocessing; the records mark it."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them in the records."""
    jobs: int = 1
    """Processes that each evaluate a cell, one per GPU if there are several; results do not depend on it."""


COMMANDS = {"classifier": ClassifierOptions, "detector": DetectorOptions}


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    available(options.device)
    if isinstance(options, ClassifierOptions) and not 0 <= (options.expected or 0) <= 100:
        raise InputError(f"--expected is an accuracy in percent, 0 to 100, got {options.expected:g}")
    return classifier(options) if isinstance(options, ClassifierOptions) else detector(options)


def parse(arguments: list[str]) -> ClassifierOptions | DetectorOptions:
    options: ClassifierOptions | DetectorOptions = cli.parse(COMMANDS, arguments, description=__doc__)
    if isinstance(options, DetectorOptions):
        cells_of(options)  # refuses what it does not know
    return options


def classifier(options: ClassifierOptions) -> int:
    record = evaluate_robustness(
        options.config,
        read_checkpoint(options.checkpoint),
        options.data,
        options.output,
        device=options.device,
        workers=options.workers,
    )
    metrics = record.metrics
    images = plural(record.config["images"], "image")
    print(f"{images}, {record.config['threat_model']}: accuracy and its 95 % interval")
    for name in (name for name in metrics if name.endswith("_accuracy")):
        if metrics[name] is None:
            print(f"{name.removesuffix('_accuracy'):>10}  skipped")
        else:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            print(f"{name.removesuffix('_accuracy'):>10} {metrics[name]:5.1f} %  ({low:.1f} to {high:.1f})")
    if options.expected is not None:
        found = {name: metrics[f"clean_accuracy{name}"] or 0.0 for name in ("", "_low", "_high")}
        if not found["_low"] <= options.expected <= found["_high"]:
            raise TrainingFailedError(
                f"the clean accuracy of {options.checkpoint} is {found['']:.2f} % ({found['_low']:.2f} to "
                f"{found['_high']:.2f}), not the {options.expected:g} % expected: check the file and --data"
            )
        write_json(options.output / EXPECTED, {"expected": options.expected, "clean_accuracy": found[""]})
        print(f"clean accuracy is as expected, {options.expected:g} %")
    print(f"record written to {options.output / 'record.json'}")
    return 0


def cells_of(options: DetectorOptions) -> tuple[list[Cell], ImageChoice]:
    """The requested cells, and the images to evaluate them on."""
    import robust_backbones.detection  # noqa: F401  # first: it says so when Detectron2 is missing
    from robust_backbones.detection.attacks import DetectorAttack
    from robust_backbones.detection.cell_images import ImageChoice
    from robust_backbones.detection.cells import attack_cell, corruption_cells

    targeted = options.attack_target is not None
    if targeted and options.attacks:
        raise InputError("--attack-target is an attack of its own: give it without --attacks")
    losses = ("classification",) if targeted else tuple(dict.fromkeys(options.attacks))
    if losses and options.threat_model is None:
        raise InputError("an attack needs --threat-model, such as Linf:4/255")
    if options.threat_model is not None and not losses:
        raise InputError("--threat-model is of an attack: give --attacks or --attack-target too")
    cells = corruption_cells(options.corruptions, options.severities)
    cells += [
        attack_cell(
            DetectorAttack(
                threat_model=options.threat_model or ThreatModel(),
                loss=loss,
                steps=options.attack_steps,
                random_start=options.attack_restarts > 1,
                restarts=options.attack_restarts,
                schedule=options.attack_schedule,
                target=options.attack_target,
            )
        )
        for loss in losses
    ]
    return cells, ImageChoice(options.limit, options.seed)


def detector(options: DetectorOptions) -> int:
    cells, images = cells_of(options)

    from robust_backbones.detection.cell_images import find_domains
    from robust_backbones.detection.robust_evaluation import evaluate_detector

    domains = [name for name, *_ in find_domains(options.domains)] if options.domains else []
    worst = ["attack-worst"] if len(options.attacks) > 1 else []
    earlier = [path.parent.name for path in sorted(options.output.glob("cells/*/record.json"))]
    known = dict.fromkeys(["clean", *(cell.name for cell in cells), *worst, *domains, *earlier])
    if unknown := [name for name in options.errors if name not in known]:
        raise InputError(f"no cell {unknown[0]} was evaluated: choose --errors among {', '.join(known)}")

    record = evaluate_detector(
        options.config,
        options.weights,
        options.output,
        cells,
        images=images,
        domains=options.domains,
        device=options.device,
        jobs=options.jobs,
        workers=options.workers,
        allow_unverified=options.allow_unverified_detector,
        skip=options.skip_unreadable,
    )
    names = record.config["cells"]
    shown = f"{plural(record.config['images'], 'image')}, {plural(len(names), 'cell')}"
    print(f"{record.dataset}, {shown} in {record.seconds:.0f} s")
    print("\n".join(tables(record.metrics, names, record.config["measure"])))
    for name, warnings in record.config["warnings"].items():
        print("\n".join(f"warning: {name}: {warning}" for warning in warnings))
    print("\n".join(draw_errors(options.output, images, record, options.errors)))
    print(f"record written to {options.output / 'record.json'}")
    return 0


def draw_errors(output: Path, images: ImageChoice, record: RunRecord, names: Sequence[str]) -> list[str]:
    """Draw the error types of the boxes of some cells, as ``output/errors.*``; returns the lines of a table of them."""
    from robust_backbones.analysis.detection_errors import detection_errors
    from robust_backbones.analysis.error_figures import error_figure, error_table
    from robust_backbones.analysis.figures import MOST_CURVES
    from robust_backbones.detection.cell_images import take_images
    from robust_backbones.detection.evaluators import ground_truth

    chosen = names or ["clean", *(cell for cell in record.config["cells"] if cell.startswith(("domain-", "attack-")))]
    errors, most = {}, (record.config.get("TEST.MAX_DETS") or DETECTOR_KEYS["TEST.MAX_DETS"])[-1]
    for cell in chosen[:MOST_CURVES]:
        folder = output / "cells" / cell
        truth = ground_truth(take_images(RunRecord.read(folder / "record.json").dataset, images, output / "images"))
        found = json.loads((folder / "detections.json").read_text())
        errors[cell] = detection_errors(truth, found, "bbox", most=most)
    title = f"{record.dataset}, {plural(record.config['images'], 'image')}"
    error_figure(errors, title, output / "errors")
    rest = chosen[MOST_CURVES:]
    return [
        "COCO's AP50 of boxes, and the points that the repair of each type of error gives (TIDE):",
        error_table(errors).to_markdown(),
        *([f"not drawn, because there is no room: {', '.join(rest)}; choose with --errors"] if rest else []),
        f"drawn in {output / 'errors.svg'}",
    ]


def tables(metrics: Mapping[str, float | None], cells: Sequence[str], measure: str) -> list[str]:
    """P, mPC, rPC and all cells other than corruptions in all measures; then corruptions by severity in one measure."""
    measures = [name.removeprefix("P/") for name in metrics if name.startswith("P/")]
    corrupted = {*cells} & {f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES}
    names = ["P", "mPC", "rPC", *sorted({*cells} - corrupted - {"clean"})]
    rows = [{"": name, **{column: metrics.get(f"{name}/{column}") for column in measures}} for name in names]
    found = [Table("", rows, {"": ":", **dict.fromkeys(measures, ":.2f")}).to_text()]
    if corrupted:
        severities = {str(severity): f"-{severity}" for severity in SEVERITIES} | {"mean": ""}
        kinds = [name for name in CORRUPTIONS if any(f"{name}{end}" in corrupted for end in severities.values())]
        rows = [
            {measure: name, **{head: metrics.get(f"{name}{end}/{measure}") for head, end in severities.items()}}
            for name in kinds
        ]
        found.append(Table("", rows, {measure: ":", **dict.fromkeys(severities, ":.2f")}).to_text())
    return found
