"""Adversarially robust backbones for Detectron2: train, convert with proof, plug in, measure.

The functions of ``robust_backbones.api`` are imported when they are first asked for.
"""

# ruff: noqa: F405
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_backbones.api import *  # noqa: F403

__version__ = "0.2.0"
__all__ = [
    "AttackConfig",
    "Checkpoint",
    "ConversionReport",
    "InputError",
    "PretrainConfig",
    "ProbeConfig",
    "RobustnessConfig",
    "Statement",
    "ThreatModel",
    "convert",
    "evaluate_robustness",
    "get_config_file",
    "linear_probe",
    "load_backbone",
    "pgd",
    "pretrain",
    "read_checkpoint",
    "verify",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from robust_backbones import api

    return getattr(api, name)
