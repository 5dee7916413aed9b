"""How robust a detector is: cells, each one evaluation on the same images, changed in one way; resumable cell by cell.

A cell is ``clean``, ``CORRUPTION-SEVERITY``, ``domain-NAME``, ``attack-LOSS`` or whatever else changes inputs before
the detector sees them. P, mPC and rPC are those of Michaelis et al. 2019, "Benchmarking robustness in object
detection", eq. 1 and 2.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from pycocotools.coco import COCO
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from tqdm import tqdm

from robust_backbones.checkpoint.format import sha256
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    check_corruption,
    corrupt,
    image_seed,
    load_library,
)
from robust_backbones.detection.attacks import DetectorAttack, attack_image
from robust_backbones.detection.config import load_config
from robust_backbones.detection.data_stream import WorkerMapper
from robust_backbones.detection.datasets import check_datasets, evaluator_kind, register_datasets
from robust_backbones.detection.evaluators import VocEvaluator, coco_metrics, ground_truth
from robust_backbones.detection.hooks import flat_metrics
from robust_backbones.detection.predictor import TrainedDetector, load_detector
from robust_backbones.detection.sanity import sanity_check, sanity_warnings
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.identity import claim, identity
from robust_backbones.runs.locks import HeldError, lock
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals

MEASURES = ("bbox/AP", "bbox/AP50", "segm/AP")
"""What P, mPC and rPC are told of; AP50 is VOC's own."""
CLEAN = "clean"

Sample = dict[str, Any]
"""Detectron2's input dictionary of one image."""
Row = dict[str, Any]
"""A detection in COCO's result format."""
Change = Callable[[nn.Module, Sample, int], Sample]
"""(detector in eval mode, its input with ground truth ``instances`` at the input's size, seed) -> the input to detect
on. An entry ``numbers``, a dict of floats, is averaged over the images into the cell's metrics."""
Check = Callable[[nn.Module, Sequence[Sample]], dict[str, float]]
"""(detector in eval mode, inputs as a Change gets them) -> further metrics of the cell."""
CHECKED_IMAGES = 8
"""Of those of a cell that show objects, so many, the first ones, make the inputs of a Check."""


@dataclass(frozen=True)
class Cell:
    """One evaluation; has to be picklable."""

    name: str
    dataset: str = ""
    """A registered set, in COCO's or VOC's format; "": the configuration's."""
    corruption: str = ""
    """Of the image file as it is read, before it is resized."""
    severity: int = 0
    change: Change | None = None
    """Of the input, after it is resized."""
    check: Check | None = None
    """Whether the change does what it should; goes with ``change``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else tells this cell from another one of its name; plain JSON."""


@dataclass(frozen=True)
class CellChoice:
    """Which corrupted images a detector is measured on beside the clean ones, and on how many images."""

    corruptions: tuple[str, ...] = ("all",)
    """The names of corruptions; all: the 15 of Hendrycks & Dietterich 2019; none."""
    severities: tuple[int, ...] = SEVERITIES
    """1 to 5, or 0 for images as they are."""
    limit: int | None = None
    """Only so many of the annotated images (of each domain too); a greater limit takes the same ones and more. Classes
    that they do not show count as AP 0 by VOC 2007's metric, and not at all by COCO's."""
    seed: int = 0
    """Decides the corruptions' random numbers and, with a limit, which images are taken."""

    def __post_init__(self) -> None:
        for name in self.corruption_names:
            for severity in self.severities:
                check_corruption(name, severity)
        if self.limit is not None and self.limit < 1:
            raise InputError(f"a limit of {self.limit} leaves no image: give 1 or more")

    @property
    def corruption_names(self) -> tuple[str, ...]:
        if self.corruptions == ("all",):
            return CORRUPTIONS
        return () if self.corruptions == ("none",) else tuple(dict.fromkeys(self.corruptions))


def evaluate_detector(
    config_file: Path,
    weights: Path,
    output: Path,
    choice: CellChoice,
    *,
    domains: Path | None = None,
    attacks: Sequence[DetectorAttack] = (),
    more_cells: Sequence[Cell] = (),
    device: str = "cpu",
    jobs: int = 1,
    workers: int = 2,
) -> RunRecord:
    """Measure a detector in every cell asked for; cells that ``output`` holds already are not run again.

    Each cell gets a folder ``output/cells/NAME`` with record.json and detections.json (COCO's result format; VOC's
    classes count from 1), and ``output/record.json`` then tells P, mPC and rPC over all cells that ``output`` holds.
    The same command may run several times at once, on machines that share ``output`` too: they share the cells.

    Args:
        config_file: the detector's, as its run's config.yaml; its one DATASETS.TEST is the set to evaluate on.
        weights: the detector, as model_final.pth.
        domains: a folder with a folder a domain, as ``find_domains`` reads it.
        attacks: white-box ones, a cell each; of two or more the worst for each image makes ``attack-worst`` (see
            ``worst_attacks``). The signs of gradient masking that ``sanity_check`` sees on CHECKED_IMAGES images are
            in the cells' metrics, and as sentences in ``warnings`` of the record's configuration.
        more_cells: further ones; names that begin with ``attack-`` count as attacks.
        device: ``cpu`` or ``cuda``, where the jobs are spread over all GPUs.
        jobs: processes that each evaluate a cell; a CPU's cores are theirs to share (OMP_NUM_THREADS).
        workers: processes of each job that decode and corrupt images; neither changes any result.

    Raises:
        InputError: what is given does not fit together, or ``output`` holds something else.
        PreemptedError: SIGTERM or SIGUSR1 came; finished cells are kept.
    """
    if jobs < 1 or workers < 0:
        raise InputError(f"{jobs} jobs with {workers} workers cannot work: give at least one job and no fewer workers")
    # Mixed precision is for training; in float16 the configuration would be refused on a CPU.
    cfg = load_config(config_file, ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", False])
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"{config_file} has {len(cfg.DATASETS.TEST)} sets in DATASETS.TEST: leave it the one to use")
    if any(choice.severities) and choice.corruption_names:
        load_library()  # or the reason that it cannot be
    (dataset,) = cfg.DATASETS.TEST
    rows = find_domains(domains) if domains else []
    cfg.DATASETS.COCO_FORMAT = (*cfg.DATASETS.COCO_FORMAT, *rows)
    cfg.DATASETS.TEST = (dataset, *(name for name, *_ in rows))
    register_datasets(cfg)
    for sentence in check_datasets(cfg, eval_only=True):
        print(f"warning: {sentence}", file=sys.stderr)
    _check_classes(cfg.DATASETS.TEST)

    cells = [Cell(CLEAN)]
    cells += [
        Cell(f"{name}-{severity}", corruption=name, severity=severity)
        for name in choice.corruption_names
        for severity in sorted(set(choice.severities))
    ]
    cells += [Cell(name, name, settings={"images_sha256": _fingerprint(name, choice)}) for name, *_ in rows]
    cells += [*_attack_cells(attacks), *more_cells]
    if not weights.is_file():
        raise InputError(f"no weights at {weights}: give a detector's .pth file, as OUTPUT_DIR/model_final.pth")
    job = _Job(cfg, weights, output, cells, choice, workers, _identity(cfg, weights, dataset, choice))
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    detector = load_detector(on_cpu if jobs > 1 else cfg, weights)  # before anything is written
    _check_categories(detector, dataset)
    for attack in attacks:
        attack.check(detector.model)
    claim(output, job.identity, DETECTOR_KEYS)

    done = sum(job.is_finished(cell) for cell in cells)
    with (
        stop_on_signals() as stop,
        tqdm(total=len(cells), initial=done, desc="cells", unit="cell", disable=None, leave=False) as bar,
    ):
        turns = job.run(detector, stop) if jobs == 1 else job.run_in_processes(jobs, stop)
        for _ in turns:
            bar.n = sum(job.is_finished(cell) for cell in cells)
            bar.refresh()
    attacked = [cell for cell in cells if cell.name.startswith("attack-")]
    if len(attacked) > 1:
        job.evaluate_worst(attacked)
    return _write_summary(output, job.identity, cfg)


def _attack_cells(attacks: Iterable[DetectorAttack]) -> Iterator[Cell]:
    """A cell ``attack-LOSS`` for each; its metrics hold the mean of the attacked loss before and after."""
    for attack in attacks:
        name = f"attack-{attack.loss}" if attack.target is None else f"attack-target-{attack.target}"
        yield Cell(
            name,
            change=partial(_attacked, attack=attack),
            check=partial(sanity_check, attack=attack) if attack.threat_model.epsilon > 0 else None,
            settings=asdict(attack),
        )


def _attacked(model: nn.Module, sample: Sample, seed: int, *, attack: DetectorAttack) -> Sample:
    found = attack_image(model, sample, attack, seed=seed)
    return {**found.sample, "numbers": {"clean_loss": found.clean_loss, "loss": found.loss}}


def find_domains(folder: Path) -> list[tuple[str, str, str]]:
    """Rows of (``domain-NAME``, annotation file, image folder) for each folder NAME, sorted.

    As in COCO-O, ``NAME/annotations/instances_val2017.json`` and ``NAME/val2017/``: the annotation file is the one
    JSON file in NAME/annotations or NAME, the image folder is NAME or that one in it that holds the first image.

    Raises:
        InputError: there is no such folder, no domain in it, or a domain without one annotation file or its images.
    """
    if not folder.is_dir():
        raise InputError(f"no folder of domains at {folder}: check --domains")
    rows = []
    for domain in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        files = [file for place in (domain / "annotations", domain) for file in sorted(place.glob("*.json"))]
        if len(files) != 1:
            raise InputError(
                f"the domain {domain} has {len(files)} annotation files: leave one .json in it or in its annotations/"
            )
        try:
            first = json.loads(files[0].read_text())["images"][0]["file_name"]
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(f"{files[0]} names no images: give an annotation file in COCO's format") from None
        places = [place for place in (domain, *sorted(domain.iterdir())) if (place / first).is_file()]
        if not places:
            raise InputError(f"the domain {domain} lacks its image {first}: put the images in a folder in it")
        rows.append((f"domain-{domain.name}", str(files[0].resolve()), str(places[0].resolve())))
    if not rows:
        raise InputError(f"no domain in {folder}: give a folder with a folder a domain, as COCO-O has them")
    return rows


def summarize(cells: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """The metrics of cells by their names -> P, mPC, rPC (a percentage), every mean and cell, for each of MEASURES.

    ``P/bbox/AP`` is the clean one. ``fog/bbox/AP`` is the mean over fog's five severities, ``mPC/bbox/AP`` that over
    the 15 corruptions (Michaelis et al. 2019, eq. 1), ``rPC/bbox/AP`` its ratio to P (eq. 2); ``fog-3/bbox/AP`` is a
    cell's. A mean that lacks a cell is None, but ``corrupted/bbox/AP`` is that over whatever corruptions there are.
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


@dataclass(frozen=True)
class _Job:
    """Cells to evaluate, in this process or in several; what is pickled for these."""

    cfg: CfgNode
    weights: Path
    output: Path
    cells: Sequence[Cell]
    choice: CellChoice
    workers: int
    identity: dict[str, Any]

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

    def run(self, detector: TrainedDetector, stop: StopRequest, *, place: int = 1) -> Iterator[None]:
        """Evaluate every cell that nobody else does, turn by turn, until all are there."""
        sets = {cell.dataset: self.take_images(cell) for cell in self.cells}
        # A pool of OpenCV's threads would not survive the fork of the data workers, which are its threads here.
        cv2.setNumThreads(1)
        rest = list(self.cells)
        while rest := [cell for cell in rest if not self.is_finished(cell)]:
            _check_stop(stop)
            moved = False
            for cell in rest:
                with contextlib.suppress(HeldError), lock(self.output / "locks" / cell.name):
                    if not self.is_finished(cell):
                        self._evaluate(cell, sets[cell.dataset], detector, stop, place)
                    moved = True
                yield
            if not moved:
                time.sleep(1)

    def _evaluate(self, cell: Cell, dataset: str, detector: TrainedDetector, stop: StopRequest, place: int) -> None:
        start = time.perf_counter()
        metrics, rows = _measure(self, cell, dataset, detector.model, stop, place)
        self._write(cell, metrics, rows, detector.backbone, detector.threat_model, time.perf_counter() - start)

    def _write(
        self,
        cell: Cell,
        metrics: dict[str, float | None],
        rows: Sequence[Row],
        backbone: dict[str, Any],
        threat_model: str | None,
        seconds: float,
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
            seed=self.choice.seed,
            config={**self.identity, "cell": cell.name, "settings": dict(cell.settings)},
            seconds=seconds,
        ).write(self.folder(cell) / "record.json")

    def take_images(self, cell: Cell) -> str:
        """The name of the set that a cell is evaluated on."""
        return take_images(cell.dataset or self.cfg.DATASETS.TEST[0], self.choice, self.output / "images")

    def evaluate_worst(self, attacks: Sequence[Cell]) -> None:
        """The cell ``attack-worst``, from the others' detections; takes no detector."""
        start = time.perf_counter()
        cell = Cell("attack-worst", settings={"attacks": [attack.name for attack in attacks]})
        dataset = self.take_images(attacks[0])
        detections = {
            attack.name: json.loads((self.folder(attack) / "detections.json").read_text()) for attack in attacks
        }
        chosen = worst_attacks(ground_truth(dataset), detections)
        rows = [row for name, rows in detections.items() for row in rows if chosen[row["image_id"]] == name]
        metrics: dict[str, float | None] = metrics_of(rows, dataset, masks=self.cfg.MODEL.MASK_ON)
        metrics |= {f"images/{name}": float(list(chosen.values()).count(name)) for name in detections}
        held = RunRecord.read(self.folder(attacks[0]) / "record.json")
        self._write(cell, metrics, rows, held.backbone, held.threat_model, time.perf_counter() - start)

    def run_in_processes(self, jobs: int, stop: StopRequest) -> Iterator[None]:
        """The same in ``jobs`` processes, one a GPU where there are several."""
        errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
        context = torch.multiprocessing.start_processes(
            _in_process, args=(self, errors), nprocs=jobs, join=False, start_method="spawn"
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
            _check_stop(stop)
            raise TrainingFailedError(f"a job failed: {error}") from None


def _in_process(rank: int, job: _Job, errors: Any) -> None:
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


def _check_stop(stop: StopRequest) -> None:
    if stop:
        raise PreemptedError("asked to stop: finished cells are kept, and the same command goes on with the others")


def _measure(
    job: _Job, cell: Cell, dataset: str, model: nn.Module, stop: StopRequest, place: int
) -> tuple[dict[str, float | None], list[Row]]:
    """A cell's metrics, and its detections."""
    cfg = job.cfg.clone()
    cfg.OUTPUT_DIR = str(job.folder(cell))
    evaluator = Trainer.build_evaluator(cfg, dataset)
    evaluator.reset()
    items = DatasetCatalog.get(dataset)
    loader = build_detection_test_loader(
        items, mapper=_Mapper(cfg, cell, job.choice.seed), num_workers=job.workers, batch_size=1
    )
    if cell.severity and job.workers:  # compiled once here instead of in every worker
        corrupt(np.zeros((64, 64, 3), np.uint8), cell.corruption, cell.severity, seed=0)
    rows: list[Row] = []
    numbers = defaultdict[str, list[float]](list)
    checked: list[Sample] = []
    with inference_context(model), torch.no_grad():
        bar = tqdm(loader, cell.name, len(items), unit="img", position=place, leave=False, disable=None)
        for (sample,) in bar:
            _check_stop(stop)
            if cell.change is not None:
                if cell.check is not None and len(checked) < CHECKED_IMAGES and len(sample["instances"]) > 0:
                    checked.append(sample)
                seed = image_seed(Path(sample["file_name"]).name, cell.name, 0, job.choice.seed)
                sample = cell.change(model, sample, seed)
                for name, value in sample.pop("numbers", {}).items():
                    numbers[name].append(value)
            outputs = model([sample])
            evaluator.process([sample], outputs)
            if isinstance(evaluator, VocEvaluator):
                rows += voc_rows(outputs[0]["instances"], sample["image_id"])
        more = cell.check(model, checked) if cell.check is not None and checked else {}
    metrics = flat_metrics(evaluator.evaluate())
    metrics |= more
    metrics |= {name: math.fsum(values) / len(values) for name, values in numbers.items()}
    if not isinstance(evaluator, VocEvaluator):
        inference = job.folder(cell) / "inference"
        rows = json.loads((inference / "coco_instances_results.json").read_text())
        for file in inference.iterdir():
            file.unlink()
        inference.rmdir()
    return metrics, rows


class _Mapper(WorkerMapper):
    """Detectron2's for tests, the cell's corruption before all else; with ground truth where inputs are changed."""

    def __init__(self, cfg: CfgNode, cell: Cell, seed: int) -> None:
        mapper = DatasetMapper(cfg, is_train=False)
        mapper.is_train = cell.change is not None  # turns annotations into instances; the augmentation stays as it is
        self._corruption = _Corruption(cell.corruption, cell.severity, cfg.INPUT.FORMAT)
        if cell.severity:
            mapper.augmentations = T.AugmentationList([self._corruption, *mapper.augmentations.augs])
        super().__init__(mapper)
        self._seed = seed

    def __call__(self, item: Sample) -> Sample:
        name = Path(item["file_name"]).name  # the same wherever the data set lies
        self._corruption.seed = image_seed(name, self._corruption.name, self._corruption.severity, self._seed)
        try:
            return super().__call__(item)
        except (OSError, SizeMismatchError) as error:
            raise InputError(f"cannot read {item['file_name']}: {' '.join(str(error).split())}") from None


class _Corruption(T.Transform):
    """Detectron2's transform of an image, in its channel order, that leaves everything else where it is."""

    def __init__(self, name: str, severity: int, image_format: str) -> None:
        super().__init__()
        if severity and image_format not in ("RGB", "BGR"):
            raise InputError(f"corruptions are of colour images, not of INPUT.FORMAT {image_format}: give RGB or BGR")
        self.name, self.severity = name, severity
        self.seed = 0
        self._channels = slice(None, None, 1 if image_format == "RGB" else -1)

    def apply_image(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = np.ascontiguousarray(img[..., self._channels])
        return corrupt(image, self.name, self.severity, seed=self.seed)[..., self._channels]

    def apply_coords(self, coords: NDArray[np.float64]) -> NDArray[np.float64]:
        return coords

    def apply_segmentation(self, segmentation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return segmentation


def _chosen(dataset: str, choice: CellChoice) -> list[dict[str, Any]]:
    """The set's images, or ``choice.limit`` of its annotated ones, in the set's order."""
    items: list[dict[str, Any]] = DatasetCatalog.get(dataset)
    if choice.limit is None:
        return items
    annotated = [index for index, item in enumerate(items) if any(not a.get("iscrowd", 0) for a in item["annotations"])]
    order = torch.randperm(len(annotated), generator=torch.Generator().manual_seed(choice.seed))
    return [items[annotated[place]] for place in sorted(order[: choice.limit].tolist())]


def take_images(dataset: str, choice: CellChoice, folder: Path) -> str:
    """Register the images that are asked for as a set of their own, which evaluators then count alone; gives its name.

    ``folder`` gets its annotation file (COCO) or list of images (VOC). Without a limit it is the set itself.
    """
    if choice.limit is None:
        return dataset
    items, metadata = _chosen(dataset, choice), MetadataCatalog.get(dataset).as_dict()
    ids = {item["image_id"] for item in items}
    name = f"{dataset}_limited"
    path = folder.resolve() / f"{name}.json"
    if "json_file" in metadata:
        content = json.loads(Path(metadata["json_file"]).read_text())
        content["images"] = [image for image in content["images"] if image["id"] in ids]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content))
        metadata["json_file"] = str(path)
    elif evaluator_kind(dataset) == "pascal_voc":
        path = path.with_suffix(".txt")
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{item['image_id']}\n" for item in items))
        metadata["split"] = str(path.with_suffix(""))  # joined to VOC's folder of lists, an absolute path stays alone
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: items)
    MetadataCatalog.get(name).set(**{**metadata, "name": name})
    return name


def _fingerprint(dataset: str, choice: CellChoice) -> str:
    """SHA-256 of the images' names and annotations."""
    items = [{**item, "file_name": Path(item["file_name"]).name} for item in _chosen(dataset, choice)]
    return hashlib.sha256(json.dumps(items, default=str).encode()).hexdigest()


def _identity(cfg: CfgNode, weights: Path, dataset: str, choice: CellChoice) -> dict[str, Any]:
    """What all cells of one folder share."""
    kept = ("MODEL.", "INPUT.", "TEST.DETECTIONS")
    keys = {name: value for name, value in identity(cfg).items() if name.startswith(kept) and name != "MODEL.WEIGHTS"}
    return {
        **keys,
        "weights_sha256": sha256(weights),
        "dataset": dataset,
        "images": len(_chosen(dataset, choice)),
        "images_sha256": _fingerprint(dataset, choice),
        "limit": choice.limit,
        "seed": choice.seed,
    }


def _check_classes(datasets: Sequence[str]) -> None:
    first, *others = ({"name": name, "classes": list(MetadataCatalog.get(name).thing_classes)} for name in datasets)
    for other in others:
        if other["classes"] != first["classes"]:
            raise InputError(
                f"{other['name']} has other classes than {first['name']} ({_difference(other, first)}): "
                "give domains with the categories of the data set that the detector was made for"
            )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    pairs = zip(one["classes"], other["classes"], strict=True)
    return next(f"{a!r} instead of {b!r}" for a, b in pairs if a != b)


def _check_categories(detector: TrainedDetector, dataset: str) -> None:
    names = [category["name"] for category in detector.categories]
    classes = list(MetadataCatalog.get(dataset).thing_classes)
    if names != classes:
        raise InputError(
            f"the detector knows {', '.join(names[:3])}, ... and {dataset} has {', '.join(classes[:3])}, ...: "
            "give a configuration with the data set that the detector was made for"
        )


def voc_rows(instances: Instances, image_id: str) -> list[Row]:
    """Detections in COCO's result format, classes from 1; in float64, so that the float32 boxes come back exactly."""
    corners = instances.pred_boxes.tensor.cpu().double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    scores, classes = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {"image_id": image_id, "category_id": number + 1, "bbox": box, "score": score}
        for box, score, number in zip(boxes, scores, classes, strict=True)
    ]


def metrics_of(rows: Sequence[Row], dataset: str, *, masks: bool) -> dict[str, float | None]:
    """The metrics of detections as a cell's detections.json holds them, by the set's own evaluator."""
    if evaluator_kind(dataset) == "coco":
        truth = ground_truth(dataset)
        tasks = ("bbox", "segm") if masks else ("bbox",)
        return flat_metrics({task: coco_metrics(truth, rows, task) for task in tasks})
    evaluator = VocEvaluator(dataset)
    evaluator.reset()
    for image_id, group in _by_image(rows).items():
        boxes = torch.tensor([row["bbox"] for row in group], dtype=torch.float64)
        found = Instances((1, 1))  # VOC's evaluator does not ask for the image's size
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        found.scores = torch.tensor([row["score"] for row in group])
        found.pred_classes = torch.tensor([row["category_id"] - 1 for row in group])
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    return flat_metrics(evaluator.evaluate())


def worst_attacks(truth: COCO, detections: Mapping[str, Sequence[Row]]) -> dict[Any, str]:
    """For every image the attack under which its AP is the lowest; the first of those that tie.

    AP is COCO's box AP on this image alone: the mean over 10 IoU thresholds and the classes that it shows.

    Args:
        truth: annotations of all images.
        detections: by attack; classes and images as in ``truth``.
    """
    grouped = {name: _by_image(rows) for name, rows in detections.items()}
    chosen = {}
    for image_id in truth.imgs:
        annotations = truth.imgToAnns[image_id]
        shown = {annotation["category_id"] for annotation in annotations}
        alone = COCO()
        alone.dataset = {
            "images": [truth.imgs[image_id]],
            "categories": [truth.cats[category] for category in sorted(shown)],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            alone.createIndex()
        aps = {}
        for name, rows in grouped.items():
            seen = [row for row in rows.get(image_id, ()) if row["category_id"] in shown]
            aps[name] = coco_metrics(alone, seen, "bbox")["AP"] if annotations else math.nan
        chosen[image_id] = min(aps, key=lambda name: 0.0 if math.isnan(aps[name]) else aps[name])
    return chosen


def _by_image(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    grouped: dict[Any, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["image_id"], []).append(row)
    return grouped


def _write_summary(output: Path, identity: dict[str, Any], cfg: CfgNode) -> RunRecord:
    records = [RunRecord.read(path) for path in sorted((output / "cells").glob("*/record.json"))]
    cells = {record.config["cell"]: record for record in records}
    clean = cells[CLEAN]
    metrics = summarize({name: record.metrics for name, record in cells.items()})
    for name, record in cells.items():
        metrics |= {f"{name}/{key}": record.metrics[key] for key in ("clean_loss", "loss") if key in record.metrics}
    warnings = {name: sanity_warnings(record.metrics) for name, record in cells.items()}
    is_voc = evaluator_kind(clean.dataset) == "pascal_voc"
    summary = RunRecord(
        run_id=output.name,
        task=clean.task,
        backbone=clean.backbone,
        threat_model=clean.threat_model,
        dataset=clean.dataset,
        metrics=metrics,
        seed=clean.seed,
        config={
            **identity,
            "SEED": cfg.SEED,
            "cells": list(cells),
            "measure": "bbox/AP50" if is_voc else "bbox/AP",
            "adversarial_training": cfg.ADVERSARIAL.KIND and f"{cfg.ADVERSARIAL.KIND} {cfg.ADVERSARIAL.THREAT_MODEL}",
            "attacks": {name: cell.config["settings"] for name, cell in cells.items() if name.startswith("attack-")},
            "warnings": {name: sentences for name, sentences in warnings.items() if sentences},
        },
        seconds=sum(record.seconds for record in records),
    )
    summary.write(output / "record.json")
    return summary
