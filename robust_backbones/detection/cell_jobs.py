"""Cells evaluated one after the other or in several processes; a kill loses no finished cell."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.multiprocessing
from detectron2.config import CfgNode
from torch.multiprocessing.spawn import ProcessException

from robust_backbones.detection.cell_images import ImageChoice, take_images
from robust_backbones.detection.cells import Cell, Row, check_stop, measure
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.evaluators import ground_truth
from robust_backbones.detection.predictor import TrainedDetector, load_detector
from robust_backbones.detection.worst_attacks import metrics_of, worst_attacks
from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.locks import lock_if_free
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals


@dataclass(frozen=True)
class CellJob:
    """Cells of one detector to evaluate; the same job may run in several processes, which share its cells."""

    cfg: CfgNode
    weights: Path
    output: Path
    cells: Sequence[Cell]
    images: ImageChoice
    workers: int
    """Processes that decode and corrupt images."""
    identity: Mapping[str, Any]
    """What all cells in ``output`` share; part of every record."""

    def folder(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Whether it has its record.

        Raises:
            InputError: the record is of other settings.
        """
        path = self.folder(cell) / "record.json"
        if not path.exists():
            return False
        if RunRecord.read(path).config["settings"] != cell.settings:
            raise InputError(f"{path.parent} was measured with other settings: choose another --output")
        return True

    def dataset(self, cell: Cell) -> str:
        """The registered set that a cell is evaluated on."""
        return take_images(cell.dataset or self.cfg.DATASETS.TEST[0], self.images, self.output / "images")

    def run(self, detector: TrainedDetector, stop: StopRequest, *, place: int = 1) -> Iterator[None]:
        """Evaluate every cell that no other process does, and yield after each, until all are finished."""
        datasets = {cell.dataset: self.dataset(cell) for cell in self.cells}
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # OpenCV's threads do not survive the fork of the data workers
        try:
            rest = list(self.cells)
            while rest := [cell for cell in rest if not self.is_finished(cell)]:
                check_stop(stop)
                moved = False
                for cell in rest:
                    with lock_if_free(self.output / "locks" / cell.name) as free:
                        if free and not self.is_finished(cell):
                            self._evaluate(cell, datasets[cell.dataset], detector, stop, place)
                        moved |= free
                    yield
                if not moved:
                    time.sleep(1)
        finally:
            cv2.setNumThreads(threads)

    def _evaluate(self, cell: Cell, dataset: str, detector: TrainedDetector, stop: StopRequest, place: int) -> None:
        start = time.perf_counter()
        cfg = self.cfg.clone()
        cfg.OUTPUT_DIR = ""  # the detections go into the cell's own file
        metrics, rows = measure(
            cell,
            cfg,
            dataset,
            detector.model,
            seed=self.images.seed,
            workers=self.workers,
            stop=stop,
            place=place,
        )
        self._write(cell, metrics, rows, detector.backbone, detector.threat_model, start)

    def _write(
        self,
        cell: Cell,
        metrics: dict[str, float | None],
        rows: Sequence[Row],
        backbone: dict[str, Any],
        threat_model: str | None,
        start: float,
    ) -> None:
        with atomic_path(self.folder(cell) / "detections.json") as temporary:
            temporary.write_text(json.dumps(rows))
        RunRecord(
            run_id=f"{self.output.name}/{cell.name}",
            task="detector_robustness",
            backbone=backbone,
            threat_model=threat_model,
            dataset=cell.dataset or self.cfg.DATASETS.TEST[0],
            metrics=metrics,
            seed=self.images.seed,
            config={**self.identity, "cell": cell.name, "settings": dict(cell.settings)},
            seconds=time.perf_counter() - start,
        ).write(self.folder(cell) / "record.json")

    def evaluate_worst(self, attacks: Sequence[Cell]) -> None:
        """The cell ``attack-worst``, from the detections of the others."""
        start = time.perf_counter()
        dataset = self.dataset(attacks[0])
        files = {attack.name: self.folder(attack) / "detections.json" for attack in attacks}
        detections = {name: json.loads(file.read_text()) for name, file in files.items()}
        chosen = worst_attacks(ground_truth(dataset), detections)
        rows = [row for name, rows in detections.items() for row in rows if chosen[row["image_id"]] == name]
        metrics = metrics_of(rows, dataset, masks=self.cfg.MODEL.MASK_ON)
        metrics |= {f"images/{name}": float(list(chosen.values()).count(name)) for name in detections}
        held = RunRecord.read(self.folder(attacks[0]) / "record.json")
        cell = Cell("attack-worst", settings={"attacks": list(detections)})
        self._write(cell, metrics, rows, held.backbone, held.threat_model, start)

    def run_in_processes(self, count: int, stop: StopRequest) -> Iterator[None]:
        """``run`` in ``count`` processes, one a GPU where there are several."""
        errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
        context = torch.multiprocessing.start_processes(
            _run_in_process, args=(self, errors), nprocs=count, join=False, start_method="spawn"
        )
        try:
            while not context.join(timeout=0.5):
                yield
                if stop:
                    for process in context.processes:
                        process.terminate()
        except ProcessException as error:
            if not errors.empty():
                raise errors.get() from None
            check_stop(stop)
            raise TrainingFailedError(f"a job failed: {error}") from None


def _run_in_process(rank: int, job: CellJob, errors: Any) -> None:
    parent = torch.multiprocessing.parent_process()
    assert parent is not None
    cfg = job.cfg
    if cfg.MODEL.DEVICE.startswith("cuda"):
        device = rank % torch.cuda.device_count()
        torch.cuda.set_device(device)
        cfg.MODEL.DEVICE = f"cuda:{device}"
    try:
        register_datasets(cfg)
        with stop_on_signals() as stop:
            for _ in job.run(load_detector(cfg, job.weights), stop, place=1 + rank):
                if not parent.is_alive():
                    return
    except InputError as error:
        errors.put(error)
        sys.exit(error.exit_status)
