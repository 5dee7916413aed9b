"""The functions of ``import robust_backbones``: read, convert, verify, attack, train, measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint import sources
from robust_backbones.checkpoint.convert import ConversionReport, convert_file
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.statement import Statement, in_python
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.classification.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.configs import get_config_file
from robust_backbones.errors import InputError
from robust_backbones.models import NormalizedModel
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.linear_probe import ProbeConfig, linear_probe

if TYPE_CHECKING:
    from robust_backbones.detection.verify import StageError

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

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _with_arguments(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function``, with errors that name its arguments instead of command-line options."""

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            error.args = (in_python(str(error)),)
            raise

    call.__module__ = __name__  # by which it is pickled
    return call


read_checkpoint = _with_arguments(sources.read_checkpoint)


@_with_arguments
def load_backbone(source: str | Path | Checkpoint, *, threat_model: str | ThreatModel | None = None) -> NormalizedModel:
    """Load the network of a checkpoint, in eval mode on the CPU.

    Args:
        source: a file of any known layout, its URL, ``hub:NAME`` or ``robust://NAME`` of a published robust backbone,
            or the result of ``read_checkpoint``.
        threat_model: what it was trained against, such as ``"L2:3"``, if the file does not say.

    Returns:
        Maps RGB images in [0, 1], shape (N, 3, H, W), to logits (N, classes), and normalises inside. ``spec`` describes
        the network; ``threat_model`` is what it was trained against (None: unknown).

    Raises:
        InputError: as ``read_checkpoint``.
    """
    checkpoint = _read(source, threat_model).in_rgb()
    return NormalizedModel(checkpoint.build(), checkpoint.spec, checkpoint.threat_model).eval()


@_with_arguments
def convert(
    src: str | Path | Checkpoint, dst: str | Path, *, threat_model: str | ThreatModel | None = None
) -> ConversionReport:
    """Write a backbone in Detectron2's format, for MODEL.WEIGHTS; ``verify`` then proves that its features are equal.

    Args:
        src: as for ``load_backbone``.
        dst: the file to write: .pkl, .pth or .safetensors. It also describes the backbone.
        threat_model: as for ``load_backbone``.

    Returns:
        What was done with every tensor. Nothing is written unless ``report.ok``; otherwise ``report.check()`` raises.

    Raises:
        InputError: as ``read_checkpoint``; another suffix; ``dst`` is ``src``; Detectron2 cannot have this backbone.
    """
    return convert_file(_read(src, threat_model), dst)


@_with_arguments
def verify(src: str | Path | Checkpoint, dst: str | Path, *, image: str | Path | None = None) -> list[StageError]:
    """Compare a converted backbone's res2-res5 in Detectron2 with the source's four stages, or a ViT's last block.

    Args:
        src: as for ``load_backbone``.
        dst: what ``convert`` wrote.
        image: compare on this JPEG or PNG too, not only on random pixels.

    Returns:
        The error of each stage, with batch norm statistics from the file and from the image. For equal networks every
        ``relative`` is below 1e-4, float32's rounding.

    Raises:
        InputError: as ``read_checkpoint``; no Detectron2; the file does not fill the backbone; no such image.
    """
    from robust_backbones.detection.verify import feature_errors

    return feature_errors(_read(src, None), dst, image=image)


def _read(source: str | Path | Checkpoint, threat_model: str | ThreatModel | None) -> Checkpoint:
    if not isinstance(source, Checkpoint):
        return sources.read_checkpoint(source, statement=Statement(threat_model=threat_model))
    stated = source.threat_model if threat_model is None else ThreatModel.parse(threat_model)
    if source.threat_model not in (None, stated):
        raise InputError(f"{source.source} says that its threat model is {source.threat_model}, not {stated}")
    return replace(source, threat_model=stated)
