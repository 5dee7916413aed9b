"""Robustness of a detector: clean, on corrupted images, on other domains and under attack, resumable cell by cell.

P, mPC and rPC are those of Michaelis et al. 2019, "Benchmarking robustness in object detection", eq. 1 and 2.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from robust_backbones.checkpoint.format import sha256
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES, load_library
from robust_backbones.detection.attacks import sanity_warnings
from robust_backbones.detection.cell_images import ImageChoice, find_domains
from robust_backbones.detection.cell_jobs import WORST, CellJob
from robust_backbones.detection.cells import AttackCell, Cell, CorruptionCell
from robust_backbones.detection.collapse import oddities, sentences
from robust_backbones.detection.config import load_config
from robust_backbones.detection.data_stream import undisturbed
from robust_backbones.detection.datasets import (
    check_datasets,
    counted,
    evaluator_kind,
    register_datasets,
    skip_unreadable,
)
from robust_backbones.detection.predictor import load_detector
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.folders import shared
from robust_backbones.runs.identity import DIGESTS, identity
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import stop_on_signals

MEASURES = ("bbox/AP", "bbox/AP50", "segm/AP")
"""The metrics of which P, mPC and rPC are computed; AP50 is VOC's own."""
CLEAN = "clean"


@undisturbed()
def evaluate_detector(
    config_file: str | Path,
    weights: str | Path,
    output: str | Path,
    cells: Sequence[Cell] = (),
    *,
    images: ImageChoice | None = None,
    domains: str | Path | None = None,
    device: str = "cpu",
    jobs: int = 1,
    workers: int = 2,
    allow_unverified: bool = False,
    skip: bool = False,
) -> RunRecord:
    """Evaluate a detector on the clean images and in every cell; cells that exist in ``output`` are not run again.

    Each cell gets a folder ``output/cells/NAME`` with record.json and detections.json (COCO's result format; VOC's
    classes count from 1), and ``output/record.json`` has P, mPC and rPC over all cells in ``output``. The same command
    may run several times at once, also on machines that share ``output``: they share the cells.

    Args:
        config_file: the detector's, such as its run's config.yaml; its single DATASETS.TEST is the set to evaluate on.
        weights: the detector, such as model_final.pth.
        cells: from ``corruption_cells`` and ``attack_cell``. With two or more attacks in the same ball, those of
            earlier commands included, ``attack-worst`` has the worst one for each image. The results of
            ``sanity_check`` on a few images are in an attack's metrics, and as sentences in ``warnings`` of the
            record's configuration.
        images: all by default.
        domains: a folder with one folder per domain, as read by ``find_domains``; one cell each.
        device: ``cpu`` or ``cuda``; with ``cuda`` the jobs are distributed over all GPUs.
        jobs: processes that each evaluate a cell; on a CPU they share its cores (OMP_NUM_THREADS).
        workers: processes of each job that decode and corrupt images; like ``jobs`` it does not affect results.
        allow_unverified: accept a detector of plain Detectron2, which does not say what its backbone is; records mark
            it.
        skip: leave out images that cannot be read, instead of stopping. The records list them.

    Raises:
        InputError: the arguments do not fit together, or ``output`` holds something else.
        PreemptedError: SIGTERM or SIGUSR1 was received; finished cells are kept.
    """
    weights, output, images = Path(weights), Path(output), images or ImageChoice()
    if jobs < 1 or workers < 0:
        raise InputError(
            f"{plural(jobs, 'job')} with {plural(workers, 'worker')} cannot work: give jobs >= 1 and workers >= 0"
        )
    # Mixed precision is for training; in float16 the configuration would be refused on a CPU.
    cfg = load_config(config_file, ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", False])
    cfg.MODEL.ALLOW_UNVERIFIED |= allow_unverified
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"{config_file} has {len(cfg.DATASETS.TEST)} sets in DATASETS.TEST: leave it the one to use")
    if any(isinstance(cell, CorruptionCell) and cell.severity for cell in cells):
        load_library()  # or the reason that it cannot be
    (dataset,) = cfg.DATASETS.TEST
    rows = find_domains(Path(domains)) if domains else []
    names = [name for name, *_ in rows]
    cfg.DATASETS.COCO_FORMAT = (*cfg.DATASETS.COCO_FORMAT, *rows)
    cfg.DATASETS.TEST = (dataset, *names)
    register_datasets(cfg)
    if skip:
        skip_unreadable(cfg, eval_only=True)
    warnings = check_datasets(cfg, eval_only=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not weights.is_file():
        raise InputError(f"no weights at {weights}: give a detector's .pth file, as OUTPUT_DIR/model_final.pth")
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    detector = load_detector(on_cpu if jobs > 1 else cfg, weights)  # before anything is written
    detector.match_classes(cfg.DATASETS.TEST)
    domain_cells = [
        Cell(name, name, {"images_sha256": images.fingerprint(name), DIGESTS: (images.content(name),)})
        for name in names
    ]
    cells = [Cell(CLEAN), *cells, *domain_cells]
    job = CellJob(cfg, weights, output, cells, images, workers, _identity(cfg, weights, dataset, images))
    for cell in cells:
        cell.check(detector.model)
    with shared(output, job.identity, DETECTOR_KEYS):
        job.check_settings()
        with stop_on_signals() as stop:
            if jobs == 1:
                job.run(detector, stop)
            else:
                job.run_in_processes(jobs, stop)
        # From here on a signal ends the process: what is left takes seconds.
        if attacks := [cell for cell in cells if isinstance(cell, AttackCell)]:
            job.evaluate_worst(attacks)
        return _write_summary(job, counted(warnings))


def summarize(cells: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """The metrics of cells by their names -> P, mPC, rPC (a percentage), every mean and cell, for each of MEASURES.

    ``P/bbox/AP`` is the clean AP, ``fog-3/bbox/AP`` that of a cell, ``fog/bbox/AP`` the mean over fog's five
    severities, ``mPC/bbox/AP`` the mean over the 15 corruptions (Michaelis et al. 2019, eq. 1), and ``rPC/bbox/AP`` its
    ratio to P (eq. 2). A mean with a missing cell is None, but ``corrupted/bbox/AP`` is over the corruptions that
    exist.
    """
    metrics: dict[str, float | None] = {}
    for measure in (name for name in MEASURES if name in cells.get(CLEAN, {})):
        values = {name: cell.get(measure) for name, cell in cells.items()}
        clean = values.pop(CLEAN)
        means = {name: _mean([values.get(f"{name}-{severity}") for severity in SEVERITIES]) for name in CORRUPTIONS}
        total = _mean(means.values())
        metrics[f"P/{measure}"] = clean
        metrics[f"mPC/{measure}"] = total
        names = [f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES]
        corrupted = [values[name] for name in names if name in values]
        metrics |= {f"corrupted/{measure}": _mean(corrupted)} if corrupted else {}
        metrics[f"rPC/{measure}"] = 100 * total / clean if total is not None and clean else None
        begun = {name.rsplit("-", 1)[0] for name in values}
        metrics |= {f"{name}/{measure}": means[name] for name in CORRUPTIONS if name in begun}
        metrics |= {f"{name}/{measure}": value for name, value in values.items()}
    return metrics


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _identity(cfg: CfgNode, weights: Path, dataset: str, images: ImageChoice) -> dict[str, Any]:
    """The settings that all cells of one folder share."""
    kept = ("MODEL.", "INPUT.", "TEST.DETECTIONS", "TEST.MAX_DETS")
    keys = {name: value for name, value in identity(cfg).items() if name.startswith(kept) and name != "MODEL.WEIGHTS"}
    skipped = cfg.DATASETS.SKIPPED
    return {
        **keys,
        **({"DATASETS.SKIPPED": skipped} if skipped else {}),
        "weights_sha256": sha256(weights),
        "dataset": dataset,
        "images": len(images.items(dataset)),
        "images_sha256": images.fingerprint(dataset),
        DIGESTS: (images.content(dataset),),
        "limit": images.limit,
        "seed": images.seed,
    }


def _write_summary(job: CellJob, data_warnings: dict[str, dict[str, int]]) -> RunRecord:
    records = [RunRecord.read(path) for path in sorted((job.output / "cells").glob("*/record.json"))]
    cells = {record.config["cell"]: record for record in records}
    clean, cfg = cells[CLEAN], job.cfg
    metrics = summarize({name: record.metrics for name, record in cells.items()})
    for name, record in cells.items():
        metrics |= {f"{name}/{key}": record.metrics[key] for key in ("clean_loss", "loss") if key in record.metrics}
    warnings = {name: sanity_warnings(record.metrics) for name, record in cells.items()}
    found = json.loads((job.output / "cells" / CLEAN / "detections.json").read_bytes())
    odd = oddities(found, job.identity["images"])
    warnings[CLEAN] = [*warnings[CLEAN], *sentences({clean.dataset: odd}, job.weights.parent)]
    if worst := cells.get(WORST):
        counted_in = worst.config["settings"]["attacks"]
        if rest := [name for name in cells if name.startswith("attack-") and name not in (WORST, *counted_in)]:
            warnings[WORST] = [
                f"it is of {', '.join(counted_in)} alone, without {', '.join(rest)}: give --attacks again if they have "
                "one ball, and otherwise each ball an --output of its own"
            ]
    summary = RunRecord(
        run_id=job.output.name,
        task=clean.task,
        backbone=clean.backbone,
        threat_model=clean.threat_model,
        dataset=clean.dataset,
        metrics=metrics,
        seed=clean.seed,
        config={
            **job.identity,
            "SEED": cfg.SEED,
            "cells": list(cells),
            "measure": "bbox/AP50" if evaluator_kind(clean.dataset) == "pascal_voc" else "bbox/AP",
            "adversarial_training": cfg.ADVERSARIAL.KIND and f"{cfg.ADVERSARIAL.KIND} {cfg.ADVERSARIAL.THREAT_MODEL}",
            "attacks": {name: cell.config["settings"] for name, cell in cells.items() if name.startswith("attack-")},
            "warnings": {name: sentences for name, sentences in warnings.items() if sentences},
        },
        seconds=sum(record.seconds for record in records),
        data_warnings=data_warnings,
    )
    summary.write(job.output / "record.json")
    return summary
