#!/usr/bin/env python
r"""Measure what a trained network can do beyond its clean accuracy.

Example, a classifier's accuracy under PGD-20 and AutoAttack on 1000 images:
    python tools/evaluate.py classifier runs/r50_linf_eps4/checkpoint.pt --data imagenet/val \
        --threat-model Linf:4/255 --output runs/r50_linf_eps4_robustness --limit 1000

`python tools/evaluate.py classifier --help` lists all options. --debug shows tracebacks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from robust_backbones import cli
from robust_backbones.errors import InputError
from robust_backbones.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.sources import read_checkpoint


@dataclass
class Classifier:
    """Clean, PGD and AutoAttack accuracy of a classifier, each with its 95 % interval.

    Example, at epsilon 3:
        python tools/evaluate.py classifier checkpoint.pt --data imagenet/val --threat-model L2:3 --output runs/eval

    OUTPUT gets outcomes.jsonl (a row an image) and record.json; an evaluation that was cut off goes on when the same
    command is given again.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of any source that tools/convert_backbone.py knows, or hub:NAME."""
    data: Path
    """Folder that holds one folder of images a class."""
    output: Path
    """Folder for the results."""
    config: Annotated[RobustnessConfig, tyro.conf.arg(name="")]
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    """Processes that decode images; results do not depend on it."""


# A union needs two members to become subcommands; the second is hidden.
Arguments = Annotated[Classifier, tyro.conf.subcommand("classifier")] | Annotated[None, tyro.conf.Suppress]


def main(arguments: list[str]) -> int:
    options = cli.parse(Arguments, arguments, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but no CUDA device was found: give --device cpu")
    return classifier(options)


def classifier(options: Classifier) -> int:
    record = evaluate_robustness(
        options.config,
        read_checkpoint(options.checkpoint),
        options.data,
        options.output,
        device=options.device,
        workers=options.workers,
    )
    metrics = record.metrics
    print(f"{record.config['images']} images, {record.config['threat_model']}: accuracy and its 95 % interval")
    for name in (name for name in metrics if name.endswith("_accuracy")):
        if metrics[name] is None:
            print(f"{name.removesuffix('_accuracy'):>10}  skipped")
        else:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            print(f"{name.removesuffix('_accuracy'):>10} {metrics[name]:5.1f} %  ({low:.1f} to {high:.1f})")
    print(f"record written to {options.output / 'record.json'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
