"""The commands that write, on the smallest networks and data that make them do all of their work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from robust_backbones.__main__ import command
from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.commands import cli
from robust_backbones.data.synthetic import ShapesConfig, write_shapes
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import ROOT, randomize_batch_norms
from tests.detection.conftest import SHAPES_CONFIG, SMALL

SHAPES = ShapesConfig(
    train_images_per_class=8, val_images_per_class=4, train_scenes=8, val_scenes=4, image_size=32, scene_size=64
)
Arguments = list[str]


def prepare(root: Path, commands: Sequence[str]) -> None:
    """Write what the commands read: shapes, a small classifier, a ResNet-18, a detector, shifted sets."""
    write_shapes(root / "data", SHAPES)
    for arch in ("shufflenet_v2_x1_0", "resnet18"):
        spec = BackboneSpec(arch, 4)
        backbone = build_backbone(spec, seed=1)
        randomize_batch_norms(backbone)
        write_checkpoint(
            root / f"{arch}.pt", spec=spec, state_dict=backbone.state_dict(), threat_model=ThreatModel("L2", 0.5)
        )
    (root / "transfer").mkdir()
    for part, source in (("train", "train"), ("test", "val")):
        (root / "transfer" / part).symlink_to(root / "data/shapes_classification" / source)
    sets = ["--output", str(root / "sets"), "--kinds", "sketch", "fog-1", "--workers", "0"]
    (root / "study.yaml").write_text(yaml.safe_dump(_study(root)))
    lines = [arguments("convert", root, root)]
    if "evaluate detector" in commands:
        lines.append(arguments("train", root, root / "detector"))
    if "inheritance" in commands:
        lines.append(["inheritance", "make-sets", str(root / "data/shapes_classification/val"), *sets])
    for command_line in lines:
        if status := call(command_line, root):
            raise SystemExit(f"{command_line} cannot prepare the trials: status {status}")


def _study(root: Path) -> dict[str, Any]:
    probe = {"epochs": 2, "batch_size": 16, "image_size": 32, "val_resize": 32, "lrs": [0.01]}
    probe |= {"workers": 0, "device": "cpu"}
    task = {"transfer": "probe", "dataset": str(root / "transfer"), "options": probe}
    backbones = {"one": {"file": str(root / "shufflenet_v2_x1_0.pt")}, "other": {"file": str(root / "resnet18.pt")}}
    return {"name": "trial", "cost": "a minute", "seeds": [0], "backbones": backbones, "tasks": {"shapes": task}}


COMMANDS = (
    *("pretrain", "pretrain on two", "train", "train on two", "probe", "finetune", "evaluate classifier"),
    *("evaluate detector", "inheritance", "sweep", "convert"),
)
"""What writes; "on two" is on two processes with synchronised batch norms."""


def arguments(name: str, root: Path, output: Path) -> Arguments:
    """The line of one of ``COMMANDS``; given again after a kill, the same one resumes."""
    images, small, transfer = root / "data/shapes_classification", root / "shufflenet_v2_x1_0.pt", root / "transfer"
    two = name.endswith(" on two")
    size = "--image-size 32 --val-resize 32 --device cpu --workers 0"
    match name.removesuffix(" on two"):
        case "pretrain":
            recipe = "--arch shufflenet_v2_x1_0 --threat-model L2:0.5 --attack.steps 1 --eval-attack.steps 1 --epochs 2"
            recipe += " --batch-size 16 --lr 0.01 --no-tensorboard --checkpoint-minutes 0"
            line = f"pretrain --data {images} --output {output} {recipe} {'--sync-batch-norm' * two} {size}"
        case "train":
            syncbn = f"--config-file {ROOT}/detectron_configs/protocols/syncbn.yaml --num-gpus 2"
            solver = "SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 1 SOLVER.MAX_ITER 4 SOLVER.STEPS () "
            solver += "SOLVER.CHECKPOINT_PERIOD 1 MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0 TEST.EXPECTED_RESULTS [] "
            solver += "TEST.EVAL_PERIOD 2 TEST.PRECISE_BN.NUM_ITER 2"
            line = f"train --config-file {SHAPES_CONFIG} {syncbn * two} --resume "
            line += f"{solver} MODEL.WEIGHTS {root}/resnet18.pkl OUTPUT_DIR {output}"
            return [*line.split(), *map(str, SMALL), "TEST.VISUALIZE", "1"]  # some of whose values hold spaces
        case "probe":
            recipe = "--epochs 4 --seeds 0 1 --lrs 0.01 --batch-size 16"
            recipe += " --checkpoint-minutes 0 --image-size 32 --val-resize 32 --device cpu --workers 0"
            line = f"transfer probe {transfer} {small} --output {output} {recipe}"
        case "finetune":
            recipe = "--seeds 0 --lrs 0.01 0.02 --epochs 2 --batch-size 16"
            recipe += " --image-size 32 --val-resize 32 --device cpu --workers 0"
            recipe += " --no-tensorboard --checkpoint-minutes 0"
            line = f"transfer finetune {transfer} {small} --output {output} {recipe}"
        case "evaluate classifier":
            attack = "--threat-model L2:0.5 --attack.steps 1 --apgd-steps 2 --square-queries 3 --batch-size 4"
            line = f"evaluate classifier {small} --data {images}/val --output {output} {attack} {size}"
        case "evaluate detector":
            detector = f"{root}/detector/config.yaml {root}/detector/model_final.pth"
            cells = "--corruptions fog --severities 1 3 --device cpu --workers 0"
            line = f"evaluate detector {detector} --output {output} {cells}"
        case "inheritance":
            recipe = "--epochs 1 --batch-size 8 --distance-images 4"
            recipe += " --methods fine_tuning linear_probe wise_ft"
            sets = f"{root}/sets/sketch {root}/sets/fog-1"
            line = f"inheritance run {small} --pretraining {images} --sets {sets} --output {output} {recipe} {size}"
        case "sweep":
            line = f"sweep launch {root}/study.yaml --output {output} --executor local --jobs 2"
        case "convert":
            line = f"convert {root}/resnet18.pt {output}/resnet18.pkl"
        case _:
            raise KeyError(name)
    return line.split()


def call(arguments: Arguments, root: Path) -> int:
    """The exit status of a command line, run in this process."""
    os.environ["DETECTRON2_DATASETS"] = str(root / "data")
    verb, *rest = arguments
    sys.argv = [f"robust-backbones {verb}", *rest]
    try:
        cli.run(command(verb))
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("cli.run always exits")
