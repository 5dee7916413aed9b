"""Detectron2's configuration, read strictly: unknown keys, missing files and unsafe YAML are refused."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler

from robust_backbones.attacks import AttackConfig
from robust_backbones.configs import CONFIG_DIR, DETECTOR_KEYS, find_file, nearest_names
from robust_backbones.detection.config_values import check_values
from robust_backbones.detection.roi_heads import BackboneRes5ROIHeads
from robust_backbones.detection.yaml_files import read_yaml
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.identity import flat
from robust_backbones.threat_models import ThreatModel

ON_GPUS_ONLY = "MODEL.COMPILE pays on GPUs only (on CPUs eager mode is faster): give MODEL.COMPILE False"

_FAST_STEP: dict[str, tuple[object, ...]] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", BackboneRes5ROIHeads.__name__),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.LOAD_PROPOSALS": (False,),
    "VIS_PERIOD": (0,),
}
"""What MODEL.FAST_STEP supports."""


def add_config(cfg: CfgNode) -> None:
    """Add our keys to Detectron2's ``get_cfg()``, in place, so that its ``merge_from_file`` accepts our YAML."""
    for key, value in DETECTOR_KEYS.items():
        node, (*path, name) = cfg, key.split(".")
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[name] = value


def load_config(
    config_files: str | Path | Sequence[str | Path], overrides: Sequence[object] = (), *, classes: int = 80
) -> CfgNode:
    """A configuration from YAML files and ``KEY VALUE`` pairs; without a CUDA device it is for the CPU.

    Files that do not exist are looked up in the package, such as ``quick/mask_rcnn_R_50_FPN_coco_instant.yaml``.
    Several files are merged from left to right, and then the overrides: first the task, then the overlays that change
    it (``protocols/``, ``architectures/``).

    Args:
        classes: NUM_CLASSES if neither files nor overrides give it; 0 for ``datasets.derive_classes``.

    Raises:
        InputError: no file, or one that is missing or is not YAML; a key does not exist, or a value is of the wrong
            type or out of range.
    """
    given = [config_files] if isinstance(config_files, str | Path) else config_files
    files = [find_file(file, CONFIG_DIR) for file in given]
    if not files:
        raise InputError(f"no configuration file: give one of those in {CONFIG_DIR.name}/")
    cfg = get_cfg()
    add_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    for file in files:
        if not file.is_file():
            raise InputError(f"no configuration file {file}: the nearest names here are {nearest_names(str(file))}")
        with _one_sentence(cfg, f"the configuration {file}"):
            _merge_file(cfg, file)
    with _one_sentence(cfg, "the overrides"):
        cfg.merge_from_list([str(item) if isinstance(item, Path) else item for item in overrides])
    check_config(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        raise InputError("float16 training needs a CUDA device: give SOLVER.AMP.DTYPE bfloat16")
    return cfg


def _merge_file(cfg: CfgNode, file: Path) -> None:
    """Detectron2's ``merge_from_file`` for files of its current version."""
    loaded = CfgNode(read_yaml(file))
    if (version := loaded.get("VERSION", cfg.VERSION)) != cfg.VERSION:
        raise ValueError(f"its VERSION is {version}, and {cfg.VERSION} is what Detectron2 has had since 2019")
    cfg.merge_from_other_cfg(loaded)


@contextmanager
def _one_sentence(cfg: CfgNode, source: str) -> Iterator[None]:
    """yacs' and PyYAML's many errors as one sentence that names their source, or the key nearest to a wrong one."""
    try:
        yield
    except (
        KeyError, ValueError, AssertionError, AttributeError, TypeError, OSError, RecursionError, yaml.YAMLError,
    ) as error:  # fmt: skip
        message = str(error.args[0]) if error.args else ""
        if message.startswith("Non-existent"):
            key = message.rsplit(" ", 1)[-1]  # yacs says "Non-existent [config] key: A.B"
            near = difflib.get_close_matches(key, list(flat(cfg)), n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else "check its spelling"
            if "=" in key:
                mend = f"write {key.replace('=', ' ', 1)}, without ="
            raise InputError(f"unknown configuration key {key}: {mend}") from None
        raise InputError(f"cannot use {source}: {' '.join(str(error).split())}") from None


@contextmanager
def usable(what: str) -> Iterator[None]:
    """What Detectron2 raises for values of a configuration that it does not know, as one sentence."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError, IndexError, ArithmeticError) as error:
        text = " ".join(map(str, error.args)).split()
        said = " ".join(text) if len(text) > 1 else repr(error)
        raise InputError(
            f"Detectron2 makes no {what} of this configuration ({said}): correct it; --debug shows where it fails"
        ) from error


_LEVELS = ("p2", "p3", "p4", "p5", "p6")
_USES = {
    "GeneralizedRCNN": ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"),
    "RetinaNet": ("MODEL.RETINANET.IN_FEATURES",),
}
"""MODEL.META_ARCHITECTURE -> the keys that say which levels of a backbone it uses."""
_OF_RESNETS: dict[str, tuple[object, str]] = {
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4, "deformable convolutions"),
    "MODEL.RESNETS.RES5_DILATION": (1, "a dilated last stage"),
}
"""A ResNet's keys: their neutral values, and what other values ask for."""
_OF_ONE_NETWORK = {
    "MODEL.SWIN.": ("build_swin_fpn_backbone", "Swin"),
    "MODEL.VIT.": ("build_vit_sfp_backbone", "ViT"),
}
"""Prefixes of keys that only one MODEL.BACKBONE.NAME uses; while they are empty they ask for nothing."""
_NEUTRAL = ("MODEL.VIT.PRETRAIN_SIZE",)
"""Of these keys, those that are never empty."""
_NOT_OF_RESNETS = {
    "MODEL.BACKBONE.DROP_PATH": "leaves out no block",
    "MODEL.BACKBONE.USE_ACT_CHECKPOINT": "recomputes nothing",
}
"""What a ResNet cannot do, by key."""


def _check_backbone(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    """Raise InputError for settings that the network in MODEL.BACKBONE.NAME would ignore or fail at."""
    name = cfg.MODEL.BACKBONE.NAME
    if not isinstance(name, str):
        raise InputError(f"MODEL.BACKBONE.NAME {name!r} is no name: give one such as build_resnet_fpn_backbone")
    for group, (own_name, what) in _OF_ONE_NETWORK.items():
        asked_for = [key for key in DETECTOR_KEYS if key.startswith(group) and key not in _NEUTRAL and values[key]]
        if asked_for and name != own_name:
            usual = DETECTOR_KEYS[asked_for[0]]
            raise InputError(f"{asked_for[0]} is set, but {name} makes no {what}: give {usual!r}, or {own_name}")
    if "resnet" in name:
        for key, what in _NOT_OF_RESNETS.items():
            if values[key]:
                raise InputError(f"{key} is set, but Detectron2's ResNet {what}: give {type(values[key])()}")
        return
    if not cfg.MODEL.BACKBONE.TIMM:
        return
    for key, (usual, asked) in _OF_RESNETS.items():
        if values[key] != usual:
            raise InputError(f"{key} asks for {asked}, which {name} does not have: give {key} {usual}")
    for key in _USES.get(cfg.MODEL.META_ARCHITECTURE, ()):
        if absent := [level for level in values[key] or () if level not in _LEVELS]:
            raise InputError(
                f"{key} asks for {absent[0]}, and {name} makes {', '.join(_LEVELS)}: give a detector with FPN; C4, DC5 "
                "and RetinaNet are not made of it"
            )


def check_config(cfg: CfgNode) -> None:
    """Raise InputError for a value of our keys that is out of range, or a norm that the detector would ignore."""
    values = flat(cfg)
    if missing := DETECTOR_KEYS.keys() - values.keys():
        raise InputError(
            f"the configuration lacks {min(missing)}: call robust_backbones.detection.add_config(cfg) first"
        )
    check_values(cfg, values)
    solver = cfg.SOLVER
    log = logging.getLogger("detectron2.solver.build")  # it warns again where training builds its own
    was, log.disabled = log.disabled, True
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
        raise InputError(
            f"no schedule of {plural(solver.MAX_ITER, 'iteration')} has SOLVER.STEPS {solver.STEPS} ({error}): give "
            "rising steps below SOLVER.MAX_ITER, or () for none"
        ) from None
    finally:
        log.disabled = was
    ThreatModel.parse(cfg.ADVERSARIAL.THREAT_MODEL)
    AttackConfig(cfg.ADVERSARIAL.STEPS, cfg.ADVERSARIAL.RELATIVE_STEP_SIZE)
    if cfg.ADVERSARIAL.KIND and cfg.VIS_PERIOD > 0:
        raise InputError("VIS_PERIOD draws training images, which adversarial training cannot: give VIS_PERIOD 0")
    _check_backbone(cfg, values)
    if cfg.INPUT.SCALE_JITTER and cfg.INPUT.CROP.ENABLED:
        raise InputError("INPUT.SCALE_JITTER crops by itself: give INPUT.CROP.ENABLED False, or INPUT.SCALE_JITTER ()")
    if cfg.MODEL.FPN.NORM and cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
        mend = 'for C4 give protocols/syncbn_C4.yaml, for DC5 add MODEL.FPN.NORM ""'
        raise InputError(f"MODEL.FPN.NORM is set, but the detector has no FPN: {mend}")
    if cfg.MODEL.RESNETS.RES5_DILATION != 1 and cfg.MODEL.RESNETS.DEPTH in (18, 34):
        raise InputError("Detectron2 dilates no ResNet-18 or ResNet-34: give a deeper one, or FPN or C4 instead of DC5")
    try:
        _check_fast_step(cfg, values)
    except InputError:
        device = cfg.MODEL.DEVICE
        if cfg.MODEL.COMPILE and (device == "cpu" or (device.startswith("cuda") and not torch.cuda.is_available())):
            raise InputError(ON_GPUS_ONLY) from None
        raise
    if re.search(r"(^|/)segm/", cfg.TEST.BEST_METRIC) and not cfg.MODEL.MASK_ON:
        raise InputError(f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r} is of masks: give MODEL.MASK_ON True, or bbox/AP")
    heads = cfg.MODEL.ROI_HEADS.NAME
    if cfg.MODEL.ROI_HEADS.RES5_NORM and heads != BackboneRes5ROIHeads.__name__:
        raise InputError(
            f"MODEL.ROI_HEADS.RES5_NORM is set, but {heads} has no such norm, {BackboneRes5ROIHeads.__name__} has: "
            "for FPN give protocols/syncbn.yaml"
        )


def _check_fast_step(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    """Raise InputError for what MODEL.FAST_STEP or MODEL.COMPILE does not know."""
    if cfg.MODEL.FAST_STEP:
        known = _FAST_STEP | ({"INPUT.MASK_FORMAT": ("bitmask",)} if cfg.MODEL.MASK_ON else {})
        for key, allowed in known.items():
            if values[key] not in allowed:
                mend = f"give {key} {' or '.join(map(repr, allowed))}, or MODEL.FAST_STEP False"
                raise InputError(f"MODEL.FAST_STEP does not know {key} {values[key]!r}: {mend}")
    if cfg.MODEL.COMPILE:
        if not cfg.MODEL.FAST_STEP:
            raise InputError("MODEL.COMPILE compiles the step of MODEL.FAST_STEP: give MODEL.FAST_STEP True with it")
        if 0 in cfg.INPUT.MIN_SIZE_TRAIN and not cfg.INPUT.SCALE_JITTER:
            raise InputError("MODEL.COMPILE needs images of few sizes: give INPUT.MIN_SIZE_TRAIN without 0")
        for key in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM"):
            if "SyncBN" in str(values[key]):  # processes cannot wait for each other within a graph
                raise InputError(f"MODEL.COMPILE does not know {key} {values[key]!r}: give another norm")
