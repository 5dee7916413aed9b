#!/usr/bin/env python
"""Train and evaluate a detector, with Detectron2's own arguments; copy it to add data sets or change the training.

Example, on 8 GPUs (`robust-backbones train` is the same without this file):
    python tools/train_net.py --config-file detectron_configs/PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml \\
        --num-gpus 8 MODEL.WEIGHTS robust.pkl OUTPUT_DIR runs/voc_robust
"""

from robust_backbones.commands import cli, train


def main(cfg, args):
    """What every process of the run does; the first has read the arguments and checked data and weights before."""
    from robust_backbones.detection import Trainer, evaluate
    from robust_backbones.detection.run_folder import set_up

    # Register your own data sets in DatasetCatalog here; those of DATASETS.COCO_FORMAT are the trainer's to register.
    cfg = set_up(cfg, training=not args.eval_only)  # Detectron2's default_setup: logs, seed, OUTPUT_DIR/config.yaml
    if args.eval_only:
        return evaluate(cfg, checked=True)
    trainer = Trainer(cfg, checked=True)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def launch(arguments):
    """Read the arguments, check everything, run ``main`` in --num-gpus processes, print the results."""
    return train.main(arguments, run=main)


if __name__ == "__main__":
    cli.run(launch)
