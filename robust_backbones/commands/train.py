"""Train and evaluate Faster R-CNN or Mask R-CNN from a converted backbone; Detectron2's own interface.

Example, on 8 GPUs:
    robust-backbones train --config-file detectron_configs/PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml \\
        --num-gpus 8 MODEL.WEIGHTS robust.pkl OUTPUT_DIR runs/voc_robust

On your own data, in COCO's or VOC's format:
    robust-backbones train --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml \\
        --train mine=/data/train.json:/data/images --test mine_val=/data/val.json:/data/images \\
        MODEL.WEIGHTS robust.pkl OUTPUT_DIR runs/mine

Further --config-file options modify the first: see detectron_configs/protocols and detectron_configs/architectures.
The run stops before training unless MODEL.WEIGHTS fills every tensor of the backbone and fits the configuration.
Relative paths of data are looked up in the folder that DETECTRON2_DATASETS names, then in the working folder. Without
a GPU it runs on the CPU. OUTPUT_DIR gets model_final.pth, metrics.json and record.json (box, mask AP). After SIGTERM or
SIGUSR1 the state is saved, and the same command with --resume continues exactly. Exit status: 0 done, 1 training
diverged or its result is not the expected one, 2 bad input, 75 stopped by a signal.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from robust_backbones.commands import cli
from robust_backbones.data.annotations_sets import parts_of
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord


def main(arguments: list[str], run: Callable[[CfgNode, argparse.Namespace], None] | None = None) -> int:
    """``run(cfg, options)`` is called in every process of the run, instead of ``train_and_evaluate``."""
    options = parse(arguments)

    import robust_backbones.detection  # noqa: F401  # first: it says so when Detectron2 is missing
    from robust_backbones.detection.collapse import sentences
    from robust_backbones.detection.launch import launch
    from robust_backbones.detection.run_folder import check_expected
    from robust_backbones.runs.distributed import is_first_process

    with ExitStack() as stack:
        cfg, finished = setup(options, stack)
        if not finished:
            launch(
                run or train_and_evaluate,
                (cfg, options),
                num_gpus=options.num_gpus,
                num_machines=options.num_machines,
                machine_rank=options.machine_rank,
                dist_url=options.dist_url,
            )
    if options.machine_rank == 0 and is_first_process():
        record = RunRecord.read(Path(cfg.OUTPUT_DIR) / ("eval_record.json" if options.eval_only else "record.json"))
        for name, value in record.metrics.items():
            if name.endswith(("/AP", "/AP50", "/AP75")):
                print(f"{record.dataset} {name}: {'not defined' if value is None else f'{value:.2f}'}")
        trained = Path(cfg.MODEL.WEIGHTS).parent if options.eval_only else Path(cfg.OUTPUT_DIR)
        for warning in sentences(record.data_warnings, trained):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{'finished before: ' if finished else ''}results written to {cfg.OUTPUT_DIR}")
        check_expected(cfg, record.metrics)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--config-file", type=Path, action="append", default=[], help="may be given several times")
    what = (
        "NAME=annotations.json:IMAGES, NAME=VOC_FOLDER:LIST, or a set that Detectron2 knows; may be given several times"
    )
    add("--train", action="append", default=[], metavar="SET", help=what)
    add(
        "--test",
        action="append",
        default=[],
        metavar="SET",
        help="set to evaluate on; with --train but no --test, none",
    )
    add("--classes", metavar="NAME,NAME,...", help="of sets in VOC's format; default: all names in the XML files")
    add("--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR, if any")
    add("--extend", action="store_true", help="with --resume: up to a larger SOLVER.MAX_ITER, by the new schedule")
    add("--eval-only", action="store_true", help="evaluate the detector in MODEL.WEIGHTS")
    add("--allow-partial-backbone", action="store_true", help="initialise tensors missing from MODEL.WEIGHTS randomly")
    add("--allow-unverified-detector", action="store_true", help="accept a plain Detectron2 detector as MODEL.WEIGHTS")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read, and list them")
    add("--reference-eval", action="store_true", help="COCO AP by pycocotools: slower, the same numbers")
    add("--num-gpus", type=int, default=1, help="processes on this machine, one per GPU (or on CPUs)")
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="0 to num-machines - 1")
    add("--dist-url", default="auto", help="tcp://FIRST_MACHINE:PORT, needed with several machines")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the configuration")
    options = parser.parse_args(arguments)
    options.data_warnings = {}  # of the check of the data, once it was made
    if not options.config_file:
        raise InputError("give --config-file, such as COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    if options.eval_only and options.resume:
        raise InputError("--eval-only evaluates MODEL.WEIGHTS and resumes nothing: leave out --resume")
    if options.extend and not options.resume:
        raise InputError("--extend continues training: give --resume with it")
    if late := [word for word in options.opts if word.startswith("--")]:
        raise InputError(f"{late[0]} comes after KEY VALUE pairs: give options before them")
    if len(options.opts) % 2:
        raise InputError(f"configuration overrides come as KEY VALUE pairs, got: {' '.join(options.opts)}")
    return options


def setup(options: argparse.Namespace, stack: ExitStack) -> tuple[CfgNode, bool]:
    """The configuration, after every check, and whether its run has finished before; nothing has been written yet.

    ``stack`` then holds the folder of a training run.
    """
    from robust_backbones.detection.config import ON_GPUS_ONLY, load_config
    from robust_backbones.detection.datasets import (
        check_datasets,
        counted,
        derive_classes,
        number_of_classes,
        register_datasets,
        skip_unreadable,
    )
    from robust_backbones.detection.launch import scale_to_processes
    from robust_backbones.detection.left_out import leave_out
    from robust_backbones.detection.predictor import check_weights, classes_in
    from robust_backbones.detection.run_folder import check_folder
    from robust_backbones.runs.distributed import is_first_process
    from robust_backbones.runs.folders import began, own_folder

    cfg = load_config(options.config_file, [*own_sets(options), *options.opts], classes=0)
    if cfg.MODEL.COMPILE and cfg.MODEL.DEVICE == "cpu" and not options.eval_only:
        raise InputError(ON_GPUS_ONLY)
    cfg.MODEL.BACKBONE.ALLOW_PARTIAL |= options.allow_partial_backbone
    cfg.MODEL.ALLOW_UNVERIFIED |= options.allow_unverified_detector
    cfg.TEST.REFERENCE_EVAL |= options.reference_eval
    cfg = scale_to_processes(cfg, num_gpus=options.num_gpus, num_machines=options.num_machines)
    register_datasets(cfg)
    known = classes_in(cfg.MODEL.WEIGHTS) if options.eval_only and not number_of_classes(cfg) else 0
    derive_classes(cfg, eval_only=options.eval_only, known=known)
    if not options.eval_only and options.machine_rank == 0 and is_first_process():
        stack.enter_context(own_folder(cfg.OUTPUT_DIR))
    finished = not options.eval_only and check_folder(cfg, resume=options.resume, extend=options.extend)
    is_new = options.eval_only or not began(Path(cfg.OUTPUT_DIR))
    if options.skip_unreadable and is_new:
        skip_unreadable(cfg, eval_only=options.eval_only)
    leave_out(cfg)  # what the first start of a resumed run has found
    if is_first_process() and not finished:
        warnings = check_datasets(cfg, eval_only=options.eval_only)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        options.data_warnings = counted(warnings)
        check_weights(cfg, resume=options.resume, whole_detector=options.eval_only)
    return cfg, finished


def own_sets(options: argparse.Namespace) -> list[Any]:
    """Overrides that register the sets of --train and --test, and choose them.

    Raises:
        InputError: one does not have the format in the help.
    """
    coco, voc = [], []
    # A configuration's number is that of its own data: nobody gave one for these.
    overrides: list[Any] = ["MODEL.ROI_HEADS.NUM_CLASSES", 0, "MODEL.RETINANET.NUM_CLASSES", 0] if options.train else []
    classes = tuple(name.strip() for name in (options.classes or "").split(",") if name.strip())
    for key, texts in (("DATASETS.TRAIN", options.train), ("DATASETS.TEST", options.test)):
        names = []
        for text in texts:
            name, equals, place = text.partition("=")
            names.append(name)
            if not equals and ":" not in text:
                continue
            if not (name and place):
                raise InputError(f"{text!r} names no set: give NAME=annotations.json:IMAGES or NAME=VOC_FOLDER:LIST")
            first, second, is_coco = parts_of(place)
            if is_coco:
                coco.append((name, first, second))
            else:
                voc.append((name, first, second, *([classes] if classes else [])))
        if names or options.train:  # --train alone: nothing to evaluate on
            overrides += [key, tuple(names)]
    if classes and not voc:
        raise InputError("--classes is of sets in VOC's format, and neither --train nor --test gives one: leave it out")
    if coco:
        overrides += ["DATASETS.COCO_FORMAT", tuple(coco)]
    return [*overrides, *(["DATASETS.VOC_FORMAT", tuple(voc)] if voc else [])]


def train_and_evaluate(cfg: CfgNode, options: argparse.Namespace) -> None:
    """One process of the run: train and evaluate, or evaluate alone."""
    from robust_backbones.detection import Trainer, evaluate
    from robust_backbones.detection.run_folder import set_up

    cfg = set_up(cfg, training=not options.eval_only)
    if options.eval_only:
        evaluate(cfg, checked=True, data_warnings=options.data_warnings)
    else:
        trainer = Trainer(cfg, checked=True, data_warnings=options.data_warnings)
        trainer.resume_or_load(resume=options.resume)
        trainer.train()
