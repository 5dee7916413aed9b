#!/usr/bin/env python
"""Train a backbone adversarially with PGD, or normally at epsilon 0, on any folder with train/ and val/ in it.

Example, the paper's recipe on ImageNet at epsilon 3:
    python tools/pretrain.py --data imagenet --output runs/r50_l2_eps3 --threat-model L2:3

DATA/train and DATA/val hold one folder of images a class. OUTPUT gets checkpoint.pt, metrics.jsonl (a row an epoch)
and record.json; a run that was cut off goes on when the same command is given again. --debug shows tracebacks.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from robust_backbones import cli
from robust_backbones.errors import InputError
from robust_backbones.pretrain import PretrainConfig, pretrain


@dataclass
class Arguments:
    data: Path
    """Folder that holds train/ and val/."""
    output: Path
    """Folder for this run's results."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    """Processes that decode and augment images; results do not depend on it."""


def main(arguments: list[str]) -> int:
    options = cli.parse(Arguments, arguments, description=__doc__)
    if not options.data.is_dir():
        raise InputError(f"no data folder {options.data}: give one that holds train/ and val/")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but no CUDA device was found: give --device cpu")
    record = pretrain(options.config, options.data, options.output, device=options.device, workers=options.workers)
    clean, robust = record.metrics["clean_accuracy"], record.metrics["robust_accuracy"]
    print(f"accuracy: clean {clean:.1f} %, robust {robust:.1f} % ({record.config['eval_threat_model']})")
    print(f"checkpoint and record written to {options.output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
