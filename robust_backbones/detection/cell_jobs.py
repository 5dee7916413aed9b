"""Cells evaluated by one or several processes; a kill loses no finished cell."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.evaluation import inference_context
from pycocotools.coco import COCO
from torch.multiprocessing.spawn import ProcessException
from tqdm import tqdm

from robust_backbones.data.corruptions import image_seed
from robust_backbones.detection.cell_images import ImageChoice, take_images
from robust_backbones.detection.cells import Cell, CellMapper, Row, Sample
from robust_backbones.detection.datasets import evaluator_kind, register_datasets
from robust_backbones.detection.evaluators import MAX_DETS, VocEvaluator, build_evaluator, coco_metrics, ground_truth
from robust_backbones.detection.hooks import flat_metrics
from robust_backbones.detection.predictor import TrainedDetector, load_detector
from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError
from robust_backbones.runs.cells import check_stop, run_cells
from robust_backbones.runs.distributed import fork_workers
from robust_backbones.runs.files import write_text
from robust_backbones.runs.identity import differences
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals

WORST = "attack-worst"
CHECKED_IMAGES = 8
"""Number of images for ``Cell.check_change``, the first ones with objects."""


@dataclass(frozen=True)
class CellJob:
    """Cells of one detector to evaluate; the same job may run in several processes, which share its cells."""

    cfg: CfgNode
    weights: Path
    output: Path
    cells: Sequence[Cell]
    images: ImageChoice
    workers: int
    """Processes that decode and corrupt images; results do not depend on it."""
    identity: Mapping[str, Any]
    """The settings that all cells in ``output`` share; part of every record."""

    def folder(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.name

    def check_settings(self) -> None:
        """Raise InputError if a cell's record has other settings."""
        for cell in self.cells:
            path = self.folder(cell) / "record.json"
            if path.exists() and differences(RunRecord.read(path).config["settings"], cell.settings):
                raise InputError(f"{path.parent} was measured with other settings: choose another --output")

    def dataset(self, cell: Cell) -> str:
        """The registered set that a cell is evaluated on."""
        return take_images(cell.dataset or self.cfg.DATASETS.TEST[0], self.images, self.output / "images")

    def run(self, detector: TrainedDetector, stop: StopRequest, *, place: int = 0) -> None:
        """Evaluate every cell that no other process does; return when all are finished.

        Args:
            place: The line of the progress bar.

        Raises:
            PreemptedError: ``stop`` was requested, or the process that started this one has ended.
        """
        datasets = {cell.dataset: self.dataset(cell) for cell in self.cells}
        threads, parent = cv2.getNumThreads(), torch.multiprocessing.parent_process()
        cv2.setNumThreads(1)  # OpenCV's threads do not survive the fork of the data workers

        def run(cell: Cell) -> str:
            if parent is not None and not parent.is_alive():
                raise PreemptedError("the process that started this job has ended: finished cells are kept")
            start = time.perf_counter()
            metrics, rows = self._measure(cell, datasets[cell.dataset], detector.model, stop, place)
            self._write(cell, metrics, rows, detector, start)
            return f"{cell.name} in {time.perf_counter() - start:.0f} s"

        try:
            run_cells(self.cells, self.folder, run, stop)
        finally:
            cv2.setNumThreads(threads)

    def run_in_processes(self, count: int, stop: StopRequest) -> None:
        """``run`` in ``count`` processes, one per GPU if there are several."""
        errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
        context = torch.multiprocessing.start_processes(
            _run_in_process, args=(self, errors), nprocs=count, join=False, start_method="spawn"
        )
        try:
            while not context.join(timeout=0.5):
                if stop:
                    for process in context.processes:
                        process.terminate()
        except ProcessException as error:
            if not errors.empty():
                raise errors.get() from None
            check_stop(stop)
            raise TrainingFailedError(f"a job failed: {error}") from None
        check_stop(stop)

    def _measure(
        self, cell: Cell, dataset: str, model: torch.nn.Module, stop: StopRequest, place: int
    ) -> tuple[dict[str, float | None], list[Row]]:
        """A cell's metrics, and its detections."""
        seed = self.images.seed
        cfg = self.cfg.clone()
        cfg.OUTPUT_DIR = ""  # the detections go into the cell's own file
        evaluator, items, mapper = (
            build_evaluator(cfg, dataset),
            DatasetCatalog.get(dataset),
            CellMapper(cfg, cell, seed),
        )
        loader = build_detection_test_loader(items, mapper=mapper, num_workers=self.workers, batch_size=1)
        if self.workers:  # what a corruption compiles is compiled once here instead of in every worker
            cell.change_file(np.zeros((64, 64, 3), np.uint8), "", 0)
        numbers = defaultdict[str, list[float]](list)
        checked: list[Sample] = []
        with inference_context(model), torch.no_grad():
            for (sample,) in tqdm(loader, cell.name, len(items), unit="img", position=place, leave=False, disable=None):
                check_stop(stop)
                if cell.changes_inputs:
                    if len(checked) < CHECKED_IMAGES and len(sample["instances"]) > 0:
                        checked.append(sample)
                    image = image_seed(Path(sample["file_name"]).name, cell.name, 0, seed)
                    sample, found = cell.change(model, sample, image)
                    for name, value in found.items():
                        numbers[name].append(value)
                evaluator.process([sample], model([sample]))
            check_stop(stop)
            further = cell.check_change(model, checked) if checked else {}
        metrics = flat_metrics(evaluator.evaluate())
        metrics |= {**further, **{name: math.fsum(values) / len(values) for name, values in numbers.items()}}
        return metrics, evaluator.results

    def _write(
        self,
        cell: Cell,
        metrics: dict[str, float | None],
        rows: Sequence[Row],
        origin: TrainedDetector | RunRecord,
        start: float,
    ) -> None:
        write_text(self.folder(cell) / "detections.json", json.dumps(rows))
        RunRecord(
            run_id=f"{self.output.name}/{cell.name}",
            task="detector_robustness",
            backbone=origin.backbone,
            threat_model=origin.threat_model,
            dataset=cell.dataset or self.cfg.DATASETS.TEST[0],
            metrics=metrics,
            seed=self.images.seed,
            config={**self.identity, "cell": cell.name, "settings": dict(cell.settings)},
            seconds=time.perf_counter() - start,
        ).write(self.folder(cell) / "record.json")

    def evaluate_worst(self, attacks: Sequence[Cell]) -> None:
        """The cell ``attack-worst``, from the detections of all attacks in ``output`` in the first one's ball."""
        start = time.perf_counter()
        records = {path.parent: RunRecord.read(path) for path in self.output.glob("cells/attack-*/record.json")}
        ball = records[self.folder(attacks[0])].config["settings"].get("threat_model")
        folders = [
            folder
            for folder, record in sorted(records.items())
            if folder.name != WORST and record.config["settings"].get("threat_model") == ball
        ]
        if len(folders) < 2:
            return
        dataset = self.dataset(attacks[0])
        detections = {folder.name: json.loads((folder / "detections.json").read_text()) for folder in folders}
        truth = ground_truth(dataset)
        if evaluator_kind(dataset) == "pascal_voc":  # whose AP ignores difficult objects, as COCO's does crowds
            for annotation in truth.dataset["annotations"]:
                annotation["iscrowd"] = int(annotation.get("ignore", 0))
        chosen = worst_attacks(truth, detections, max_dets=self.cfg.TEST.MAX_DETS)
        rows = [row for name, rows in detections.items() for row in rows if chosen[row["image_id"]] == name]
        metrics = metrics_of(rows, dataset, masks=self.cfg.MODEL.MASK_ON, max_dets=self.cfg.TEST.MAX_DETS)
        metrics |= {f"images/{name}": float(list(chosen.values()).count(name)) for name in detections}
        held = records[folders[0]]
        self._write(Cell(WORST, settings={"attacks": list(detections)}), metrics, rows, held, start)


def _run_in_process(rank: int, job: CellJob, errors: Any) -> None:
    fork_workers()
    cfg = job.cfg
    if cfg.MODEL.DEVICE.startswith("cuda"):
        device = rank % torch.cuda.device_count()
        torch.cuda.set_device(device)
        cfg.MODEL.DEVICE = f"cuda:{device}"
    try:
        register_datasets(cfg)
        with stop_on_signals() as stop:
            detector = load_detector(cfg, job.weights)
            detector.match_classes(cfg.DATASETS.TEST)
            job.run(detector, stop, place=rank)
    except InputError as error:
        if not isinstance(error, PreemptedError):  # of which the main process knows
            errors.put(error)
        sys.exit(error.exit_status)


def worst_attacks(
    truth: COCO, detections: Mapping[str, Sequence[Row]], *, max_dets: Sequence[int] = MAX_DETS
) -> dict[Any, str]:
    """For every image the attack under which its AP is the lowest; the first one in case of ties.

    AP is COCO's box AP on this image alone: the mean over 10 IoU thresholds and the classes that it shows.

    Args:
        truth: Annotations of all images.
        detections: By attack; classes and images as in ``truth``.
    """
    grouped = {name: _by_image(rows) for name, rows in detections.items()}
    chosen = {}
    for image_id in truth.imgs:
        annotations = truth.imgToAnns[image_id]
        shown = {annotation["category_id"] for annotation in annotations}
        alone = COCO()
        alone.imgs = {image_id: truth.imgs[image_id]}
        alone.dataset = {"categories": [truth.cats[category] for category in shown], "annotations": annotations}
        aps = {}
        for name, rows in grouped.items():
            seen = [row for row in rows[image_id] if row["category_id"] in shown]
            ap = coco_metrics(alone, seen, "bbox", max_dets=max_dets)["AP"] if annotations else 0.0
            aps[name] = 0.0 if math.isnan(ap) else ap
        chosen[image_id] = min(aps, key=aps.__getitem__)
    return chosen


def metrics_of(
    rows: Sequence[Row], dataset: str, *, masks: bool, max_dets: Sequence[int] = MAX_DETS
) -> dict[str, float | None]:
    """The metrics of the detections in a cell's detections.json, by the set's own evaluator."""
    if evaluator_kind(dataset) == "coco":
        truth = ground_truth(dataset)
        tasks = ("bbox", "segm") if masks else ("bbox",)
        return flat_metrics({task: coco_metrics(truth, rows, task, max_dets=max_dets) for task in tasks})
    evaluator = VocEvaluator(dataset)
    evaluator.results = [*rows]
    return flat_metrics(evaluator.evaluate())


def _by_image(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    grouped = defaultdict[Any, list[Row]](list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped
