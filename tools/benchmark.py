#!/usr/bin/env python
r"""Measure us against what one would use instead: both sides in one run, on the same work, in turns.

Examples:
    python tools/benchmark.py training-step
    python tools/benchmark.py loading --data photographs
    python tools/benchmark.py all --data DATA
    python tools/benchmark.py page
    python tools/benchmark.py robustness --data cifar10 --output runs/cifar10
    python tools/benchmark.py step-counts --batches 2 8

Each benchmark checks that all ways compute the same, times them in turns, prints a table with ratios and what was to
be reached, and leaves a record, OUTPUT/NAME.json. `all` runs every one but those that OUTPUT holds already; `page`
makes docs/benchmarks.md of the records. `robustness` trains a ResNet-18 on 32 px images twice with one budget, without
and with PGD at Linf 8/255, and measures both against PGD-20; it goes on where it was cut off. `step-counts` counts how
often a training step waits for the device, and its aten calls, without a GPU. Exit status: 0 done, 1 the ways do not
compute the same, 2 bad input. --debug shows tracebacks.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.attack import PGD10
from benchmarks.coco import CocoAP
from benchmarks.conversion import Conversion
from benchmarks.detector_attack import DetectorAttack
from benchmarks.detector_training import DetectorTraining
from benchmarks.growth import Growth
from benchmarks.inference import Inference
from benchmarks.loading import Loading
from benchmarks.mask_rcnn import MaskRCNN
from benchmarks.memory import Memory
from benchmarks.modern import Modern
from benchmarks.page import summary, write_page
from benchmarks.probe import Probe
from benchmarks.robustness_gain import Robustness
from benchmarks.step_counts import StepCounts, last_line, table
from benchmarks.training_step import TrainingStep
from benchmarks.work import Work

from robust_backbones.commands import cli

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class All:
    """Every benchmark, with its defaults."""

    data: Path
    """Folder with caltech101_mini/ and detectron2/, in which VOC2007/ and coco/ are in Detectron2's layout."""
    output: Path = Work.output
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    peers: bool = True
    """Whether to measure other software too."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """docs/benchmarks.md from the records."""

    records: Path = ROOT / "docs/benchmarks"
    """Folder of the records; the figure goes there too."""
    add: Path | None = None
    """Take over the records of this folder first."""
    page: Path = ROOT / "docs/benchmarks.md"


COMMANDS = {
    "training-step": TrainingStep,
    "attack": PGD10,
    "memory": Memory,
    "probe": Probe,
    "coco-ap": CocoAP,
    "loading": Loading,
    "mask-rcnn": MaskRCNN,
    "mask-rcnn-modern": Modern,
    "detector-training": DetectorTraining,
    "inference": Inference,
    "detector-attack": DetectorAttack,
    "conversion": Conversion,
    "growth": Growth,
    "all": All,
    "page": Page,
    "robustness": Robustness,
    "step-counts": StepCounts,
}


def main(arguments: list[str]) -> int:
    options = cli.parse(COMMANDS, arguments, description=__doc__)
    match options:
        case All():
            for work in every(options):
                if work.record.exists():
                    print(f"{work.name}: {work.record} is there")
                else:
                    _measure(work)
            print(f"the records are in {options.output}; tools/benchmark.py page --add {options.output} shows them")
        case Page():
            if options.add is not None:
                for path in options.add.glob("*.json"):
                    shutil.copyfile(path, options.records / path.name)
            write_page(options.records, options.page, bfloat16=options.records / "bfloat16")
            print(f"written: {options.page}")
        case Robustness():
            print(f"\n{options.measure()}\n\ntable.md and curves.png are in {options.output}")
        case StepCounts():
            rows = options.count()
            print(f"{table(rows)}\n{last_line(rows)}")
        case _:
            _measure(options)
    return 0


def every(options: All) -> list[Work]:
    """All benchmarks on the data of one folder."""
    shared: dict[str, Any] = {"output": options.output, "device": options.device, "peers": options.peers}
    annotations = options.data / "detectron2/coco/annotations/instances_val2017.json"
    works: list[Work] = [
        Memory(**shared),
        Conversion(**shared),
        Loading(data=options.data / "detectron2/VOC2007/JPEGImages", **shared),
        PGD10(**shared),
        TrainingStep(**shared),
        MaskRCNN(**shared),
        Modern(**shared),
        DetectorTraining(voc=options.data / "detectron2/VOC2007", **shared),
        Inference(coco=options.data / "detectron2/coco", **shared),
        DetectorAttack(**shared),
        CocoAP(annotations=annotations, **shared),
        Growth(annotations=annotations, **shared),
        Probe(data=options.data / "caltech101_mini", **shared),
    ]
    # What a GPU has no part in is measured on CPUs.
    return works if options.device == "cpu" else [work for work in works if work.on_gpu]


def _measure(work: Work) -> None:
    print(f"== {work.name}: {work.title}", flush=True)
    print(f"\n{summary(work.measure())}\n\nthe record is {work.record}", flush=True)


if __name__ == "__main__":
    cli.run(main)
