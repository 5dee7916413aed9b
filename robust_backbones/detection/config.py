"""Detectron2's configuration, read strictly: unknown keys, missing files and unsafe YAML are refused."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from robust_backbones.attacks import AttackConfig
from robust_backbones.configs import CONFIG_DIR
from robust_backbones.detection.roi_heads import BackboneRes5ROIHeads
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec
from robust_backbones.threat_models import ThreatModel


def base_config() -> CfgNode:
    """Detectron2's defaults and the keys that we add."""
    cfg = get_cfg()
    # An empty MODEL.WEIGHTS means a random backbone; it has to be asked for.
    cfg.MODEL.BACKBONE.FROM_SCRATCH = False
    # A backbone file that does not fill every tensor is refused, unless parts of the backbone are to be random.
    cfg.MODEL.BACKBONE.ALLOW_PARTIAL = False
    # A norm (as RESNETS.NORM) behind res5 in the ROI heads of C4 detectors, as in MoCo's detection protocol; "": none.
    cfg.MODEL.ROI_HEADS.RES5_NORM = ""
    # On CPUs: a ROIAlign that is faster than torchvision's (benchmark mask-rcnn) and equal to it up to rounding.
    cfg.MODEL.FAST_ROI_ALIGN = True
    # "float16" is Detectron2's own AMP and needs CUDA; "bfloat16" needs no loss scaling and runs on CPUs too.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Decay, in [0, 1), of the exponential moving average of the weights, which is what is evaluated and saved; 0: off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # "AdamW" takes WEIGHT_DECAY and the like as "SGD" does, and has no use for MOMENTUM and NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The learning rate of the backbone (without FPN) as a multiple of the rest's.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # The adversary of adversarial training: "free" or "pgd", as detection/adversarial.py has them; "": none.
    cfg.ADVERSARIAL = CfgNode()
    cfg.ADVERSARIAL.KIND = ""
    # In pixels of [0, 1], before they are normalised.
    cfg.ADVERSARIAL.THREAT_MODEL = "Linf:4/255"
    # Where the perturbation of an image starts: at 0, or at a random point of the ball.
    cfg.ADVERSARIAL.RANDOM_START = False
    # m of free training: the updates for each batch. MAX_ITER and all else count updates, not batches.
    cfg.ADVERSARIAL.REPLAYS = 4
    # Of PGD; a step's size is a fraction of epsilon.
    cfg.ADVERSARIAL.STEPS = 3
    cfg.ADVERSARIAL.RELATIVE_STEP_SIZE = 2 / 3
    # Data sets in COCO's format to register: (name, annotation file, image folder), the paths within the folder
    # that the environment variable DETECTRON2_DATASETS names.
    cfg.DATASETS.COCO_FORMAT = ()
    # COCO's own (slow) pycocotools instead of faster-coco-eval, which gives the same numbers.
    cfg.TEST.REFERENCE_EVAL = False
    # How many test images are drawn with their detections to TensorBoard at each evaluation.
    cfg.TEST.VISUALIZE = 4
    # The metric, as "bbox/AP50", by which model_best.pth is chosen; "": segm/AP with masks, bbox/AP without.
    cfg.TEST.BEST_METRIC = ""
    return cfg


def load_config(config_files: Path | Sequence[Path], overrides: Sequence[object] = ()) -> CfgNode:
    """A configuration from YAML files and ``KEY VALUE`` pairs; without a CUDA device it runs on the CPU.

    Several files merge from left to right, the last word being the overrides': first the task, then the overlays
    that change it (``protocols/``, ``architectures/``).

    Raises:
        InputError: no file, or one that is missing or no YAML; a key does not exist, or a value is of the wrong type
            or out of its range.
    """
    files = [config_files] if isinstance(config_files, Path) else list(config_files)
    if not files:
        raise InputError(f"no configuration file: give one of those in {CONFIG_DIR.name}/")
    cfg = base_config()
    for file in files:
        if not file.is_file():
            raise InputError(f"no configuration file {file}: see {CONFIG_DIR.name}/ for those that exist")
        with _one_sentence(cfg, f"the configuration {file}"):
            cfg.merge_from_file(str(file), allow_unsafe=False)
    with _one_sentence(cfg, "the overrides"):
        cfg.merge_from_list([str(item) if isinstance(item, Path) else item for item in overrides])
    _check_values(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        raise InputError("float16 training needs a CUDA device: give SOLVER.AMP.DTYPE bfloat16")
    return cfg


@contextmanager
def _one_sentence(cfg: CfgNode, source: str) -> Iterator[None]:
    """yacs' and PyYAML's many errors as one sentence that names their source, or the key nearest to a wrong one."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError, OSError, yaml.YAMLError) as error:
        message = str(error.args[0]) if error.args else ""
        if message.startswith("Non-existent"):
            raise InputError(_unknown_key(cfg, message)) from None
        raise InputError(f"cannot use {source}: {' '.join(str(error).split())}") from None


def _check_values(cfg: CfgNode) -> None:
    """The ranges of the keys that ``base_config`` adds, and norms that the detector would leave out in silence."""
    if cfg.SOLVER.AMP.DTYPE not in ("float16", "bfloat16"):
        raise InputError(f"SOLVER.AMP.DTYPE {cfg.SOLVER.AMP.DTYPE!r} is not one of float16, bfloat16")
    if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
        raise InputError(f"SOLVER.EMA_DECAY {cfg.SOLVER.EMA_DECAY} is not in [0, 1): give 0.0 for none")
    if cfg.SOLVER.OPTIMIZER not in ("SGD", "AdamW"):
        raise InputError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is not one of SGD, AdamW")
    if not 0 <= cfg.SOLVER.BACKBONE_MULTIPLIER < math.inf:
        raise InputError(
            f"SOLVER.BACKBONE_MULTIPLIER {cfg.SOLVER.BACKBONE_MULTIPLIER} is no factor of a learning rate: "
            "give 1.0 for the same as the rest's"
        )
    _check_adversary(cfg)
    if cfg.TEST.VISUALIZE < 0:
        raise InputError(f"TEST.VISUALIZE {cfg.TEST.VISUALIZE} is no number of images: give 0 for none")
    if not re.fullmatch(r"(\w+/\S+)?", cfg.TEST.BEST_METRIC):
        raise InputError(f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r} is no metric: give one like bbox/AP50")
    if cfg.MODEL.FPN.NORM and cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
        raise InputError("MODEL.FPN.NORM is set, but the detector has no FPN: for C4 give protocols/syncbn_C4.yaml")
    heads = cfg.MODEL.ROI_HEADS.NAME
    if cfg.MODEL.ROI_HEADS.RES5_NORM and heads != BackboneRes5ROIHeads.__name__:
        raise InputError(
            f"MODEL.ROI_HEADS.RES5_NORM is set, but {heads} has no such norm, {BackboneRes5ROIHeads.__name__} has: "
            "for FPN give protocols/syncbn.yaml"
        )


def _check_adversary(cfg: CfgNode) -> None:
    node = cfg.ADVERSARIAL
    if node.KIND not in ("", "free", "pgd"):
        raise InputError(f'ADVERSARIAL.KIND {node.KIND!r} is not one of free, pgd: give "" for none')
    ThreatModel.parse(node.THREAT_MODEL)
    if node.REPLAYS < 1:
        raise InputError(f"ADVERSARIAL.REPLAYS {node.REPLAYS} is no number of updates a batch: give 1 or more")
    AttackConfig(node.STEPS, node.RELATIVE_STEP_SIZE)
    if node.KIND and cfg.VIS_PERIOD > 0:
        raise InputError("VIS_PERIOD draws training images, which adversarial training cannot: give VIS_PERIOD 0")


def flat_overrides(spec: BackboneSpec) -> list[object]:
    """What a backbone needs of the configuration, as the KEY VALUE list that ``load_config`` takes."""
    return [item for pair in spec.detectron2_overrides().items() for item in pair]


def _unknown_key(cfg: CfgNode, message: str) -> str:
    """yacs says ``Non-existent [config] key: A.B``; add the nearest key that exists."""
    key = message.rsplit(" ", 1)[-1]
    near = difflib.get_close_matches(key, list(flat(cfg)), n=1, cutoff=0.5)
    return f"unknown configuration key {key}" + (f": did you mean {near[0]}?" if near else ": check its spelling")


@cache
def own_defaults() -> dict[str, Any]:
    """The keys that ``base_config`` adds to Detectron2's, by their full names, as YAML has their values.

    Files of a version that did not know one of them mean its default.
    """
    theirs = flat(get_cfg())
    return {key: value for key, value in flat(yaml.safe_load(base_config().dump())).items() if key not in theirs}


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's values by their full names: ``{"TEST": {"VISUALIZE": 4}}`` -> ``{"TEST.VISUALIZE": 4}``."""
    values: dict[str, Any] = {}
    for name, value in node.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return values
