"""Detectron2's configuration, read strictly: unknown keys, missing files and unsafe YAML are refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec

CONFIG_DIR = Path(__file__).resolve().parents[2] / "detectron_configs"


def base_config() -> CfgNode:
    """Detectron2's defaults and the keys that we add."""
    cfg = get_cfg()
    # An empty MODEL.WEIGHTS means a random backbone; it has to be asked for.
    cfg.MODEL.BACKBONE.FROM_SCRATCH = False
    # "float16" is Detectron2's own AMP and needs CUDA; "bfloat16" needs no loss scaling and runs on CPUs too.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Data sets in COCO's format to register: (name, annotation file, image folder), the paths within the folder
    # that the environment variable DETECTRON2_DATASETS names.
    cfg.DATASETS.COCO_FORMAT = ()
    return cfg


def load_config(config_file: Path, overrides: Sequence[object] = ()) -> CfgNode:
    """A configuration from a YAML file and ``KEY VALUE`` pairs; without a CUDA device it runs on the CPU.

    Raises:
        InputError: the file is missing or no YAML; a key does not exist or a value is of the wrong type.
    """
    if not config_file.is_file():
        raise InputError(f"no configuration file {config_file}: see {CONFIG_DIR.name}/ for those that exist")
    cfg = base_config()
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=False)
        cfg.merge_from_list([str(item) if isinstance(item, Path) else item for item in overrides])
    except (KeyError, ValueError, AssertionError, AttributeError, TypeError, OSError, yaml.YAMLError) as error:
        message = str(error.args[0]) if error.args else ""
        if message.startswith("Non-existent"):
            raise InputError(_unknown_key(cfg, message)) from None
        raise InputError(f"cannot use the configuration {config_file}: {' '.join(str(error).split())}") from None
    if cfg.SOLVER.AMP.DTYPE not in ("float16", "bfloat16"):
        raise InputError(f"SOLVER.AMP.DTYPE {cfg.SOLVER.AMP.DTYPE!r} is not one of float16, bfloat16")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        raise InputError("float16 training needs a CUDA device: give SOLVER.AMP.DTYPE bfloat16")
    return cfg


def flat_overrides(spec: BackboneSpec) -> list[object]:
    """What a backbone needs of the configuration, as the KEY VALUE list that ``load_config`` takes."""
    return [item for pair in spec.detectron2_overrides().items() for item in pair]


def _unknown_key(cfg: CfgNode, message: str) -> str:
    """yacs says ``Non-existent [config] key: A.B``; add the nearest key that exists."""
    key = message.rsplit(" ", 1)[-1]
    near = difflib.get_close_matches(key, list(_keys(cfg)), n=1, cutoff=0.5)
    return f"unknown configuration key {key}" + (f": did you mean {near[0]}?" if near else ": check its spelling")


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in node.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]
    return keys
