"""Detectron2's configuration, read strictly: unknown keys, missing files and unsafe YAML are refused."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from robust_backbones.attacks import AttackConfig
from robust_backbones.configs import CONFIG_DIR, DETECTOR_KEYS, find_file
from robust_backbones.detection.roi_heads import BackboneRes5ROIHeads
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec
from robust_backbones.runs.identity import flat
from robust_backbones.threat_models import ThreatModel


def add_config(cfg: CfgNode) -> None:
    """Add our keys to those of Detectron2's ``get_cfg()``, in place; then its ``merge_from_file`` takes our YAML."""
    for key, value in DETECTOR_KEYS.items():
        node, (*path, name) = cfg, key.split(".")
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[name] = value


def base_config() -> CfgNode:
    """Detectron2's defaults and our keys."""
    cfg = get_cfg()
    add_config(cfg)
    return cfg


def load_config(config_files: str | Path | Sequence[str | Path], overrides: Sequence[object] = ()) -> CfgNode:
    """A configuration from YAML files and ``KEY VALUE`` pairs; without a CUDA device it runs on the CPU.

    Files that do not exist are looked for among the package's, as ``quick/mask_rcnn_R_50_FPN_coco_instant.yaml``.
    Several files merge from left to right, the last word being the overrides': first the task, then the overlays
    that change it (``protocols/``, ``architectures/``).

    Raises:
        InputError: no file, or one that is missing or no YAML; a key does not exist, or a value is of the wrong type
            or out of its range.
    """
    given = [config_files] if isinstance(config_files, str | Path) else config_files
    files = [find_file(file, CONFIG_DIR) for file in given]
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
    check_config(cfg)
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


def check_config(cfg: CfgNode) -> None:
    """Refuse values out of range of the keys that ``add_config`` adds, and norms that the detector would leave out.

    Raises:
        InputError: naming the key.
    """
    if missing := DETECTOR_KEYS.keys() - flat(cfg).keys():
        raise InputError(
            f"the configuration lacks {min(missing)}: call robust_backbones.detection.add_config(cfg) first"
        )
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
