#!/usr/bin/env python
"""Train and evaluate Faster R-CNN or Mask R-CNN from a converted backbone; Detectron2's own interface.

Example, on 8 GPUs:
    python tools/train_net.py --config-file detectron_configs/PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml \\
        --num-gpus 8 MODEL.WEIGHTS robust.pkl OUTPUT_DIR runs/voc_robust

The run stops before training unless MODEL.WEIGHTS fills every tensor of the backbone and fits the configuration.
DETECTRON2_DATASETS names the folder with the data sets. Without a GPU it runs on the CPU. OUTPUT_DIR gets
model_final.pth, metrics.json and record.json (box / mask AP). Exit status: 0 done, 1 training diverged, 2 bad input.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from robust_backbones import cli
from robust_backbones.errors import InputError
from robust_backbones.records import RunRecord

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def main(arguments: list[str]) -> int:
    import robust_backbones.detection  # noqa: F401, I001  # first: it says so when Detectron2 is missing
    from detectron2.engine import default_argument_parser, launch

    parser = default_argument_parser(epilog=" ")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    cfg = configure(options)
    if options.num_gpus > max(1, torch.cuda.device_count()):
        raise InputError(f"--num-gpus {options.num_gpus}, but {torch.cuda.device_count()} GPUs were found")
    try:
        launch(
            run,
            options.num_gpus,
            num_machines=options.num_machines,
            machine_rank=options.machine_rank,
            dist_url=options.dist_url,
            args=(cfg, options),
        )
    except FloatingPointError as error:
        print(f"error: training diverged ({error}): lower SOLVER.BASE_LR, or clip gradients", file=sys.stderr)
        return 1
    if options.machine_rank == 0:
        record = RunRecord.read(Path(cfg.OUTPUT_DIR) / ("eval_record.json" if options.eval_only else "record.json"))
        for name, value in record.metrics.items():
            if name.endswith(("/AP", "/AP50", "/AP75")):
                print(f"{record.dataset} {name}: {'not defined' if value is None else f'{value:.2f}'}")
        print(f"results written to {cfg.OUTPUT_DIR}")
    return 0


def configure(options: argparse.Namespace) -> "CfgNode":
    """The frozen configuration, after every check; nothing has been written yet."""
    from robust_backbones.detection.config import load_config
    from robust_backbones.detection.datasets import check_datasets, register_datasets
    from robust_backbones.detection.trainer import check_weights

    if not options.config_file:
        raise InputError("give --config-file, one of detectron_configs/*/*.yaml")
    if len(options.opts) % 2:
        raise InputError(f"configuration overrides come as KEY VALUE pairs, got: {' '.join(options.opts)}")
    cfg = load_config(Path(options.config_file), options.opts)
    output = Path(cfg.OUTPUT_DIR)
    if not (options.resume or options.eval_only) and (output / "metrics.json").exists():
        raise InputError(f"{output} holds another run: give --resume to go on with it, or another OUTPUT_DIR")
    register_datasets(cfg)
    check_datasets(cfg, eval_only=options.eval_only)
    if not (options.resume and (output / "last_checkpoint").exists()):
        check_weights(cfg, whole_detector=options.eval_only)
    cfg.freeze()
    return cfg


def run(cfg: "CfgNode", options: argparse.Namespace) -> None:
    """One process of the run: train and evaluate, or evaluate alone."""
    from detectron2.engine import default_setup

    from robust_backbones.detection import trainer
    from robust_backbones.detection.datasets import register_datasets

    register_datasets(cfg)  # a spawned process starts without them
    default_setup(cfg, options)
    if options.eval_only:
        trainer.evaluate(cfg)
    else:
        trainer.train(cfg, resume=options.resume)


if __name__ == "__main__":
    cli.run(main)
