"""Backbone checkpoints: our own format, and safe readers for files from elsewhere."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone, identify
from robust_backbones.records import atomic_path
from robust_backbones.threat_models import ThreatModel

FORMAT = "robust_backbones.checkpoint/1"
TRAINING_FORMAT = "robust_backbones.training/1"
"""Of the files that a run resumes from; no backbone is read from them."""

# All that a pickle of numpy arrays, tensors' metadata and plain containers needs.
_SAFE_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as read from any source: torchvision's tensor names, without prefixes."""

    spec: BackboneSpec
    state_dict: dict[str, Tensor]
    threat_model: ThreatModel | None
    """None when the source does not say how the backbone was trained."""
    layout: str
    """``robust_backbones`` or ``torchvision``."""
    source: str
    """File name without its folder."""
    source_sha256: str

    def build(self) -> nn.Module:
        """The network with these weights, in eval mode."""
        backbone = build_backbone(self.spec)
        backbone.load_state_dict(self.state_dict)
        return backbone.eval()


def write_checkpoint(
    path: Path,
    *,
    spec: BackboneSpec,
    state_dict: dict[str, Tensor],
    threat_model: ThreatModel,
    training: dict[str, Any] | None = None,
) -> None:
    """Write our own format; ``training`` is whatever a run needs to resume, and readers of the backbone ignore it."""
    content = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "threat_model": str(threat_model),
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()},
    }
    if training is not None:
        content["training"] = training
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` / ``.pt`` file without running any code it may hold.

    Raises:
        InputError: the file is missing, or is no dictionary of tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise InputError(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}): give a file of "
            "tools/pretrain.py or a torchvision state dict saved by torch.save"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors: save a state_dict()")
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ``tools/pretrain.py`` or a torchvision state dict; the layout is told by its keys.

    Raises:
        InputError: the file is missing, is no checkpoint, or its layout or architecture is not known.
    """
    content = load_tensors(path)
    try:
        if content.get("format") == FORMAT:
            layout, state_dict = "robust_backbones", content["state_dict"]
            spec = BackboneSpec(**content["spec"])
            threat_model = ThreatModel.parse(content["threat_model"])
            if identify(state_dict) != BackboneSpec(spec.arch, spec.num_classes, stem=spec.stem):
                raise InputError(
                    f"its tensors are not those of {spec.arch} with {spec.num_classes} classes and the {spec.stem} stem"
                )
        elif content and all(isinstance(value, Tensor) for value in content.values()):
            layout, state_dict, threat_model = "torchvision", content, None
            spec = identify(state_dict)
        elif content.get("format") == TRAINING_FORMAT:
            raise InputError("a run resumes from it: give the checkpoint.pt or best.pt of the same run")
        else:
            keys = ", ".join(str(key) for key in list(content)[:3])
            raise InputError(f"its layout is not known (keys: {keys} ...); known are our own and torchvision's")
    except InputError as error:
        raise InputError(f"cannot use {path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot use {path}: it is damaged ({error!r})") from None
    return Checkpoint(spec, state_dict, threat_model, layout, path.name, sha256(path))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_unpickle(file: BinaryIO) -> Any:
    """Read a pickle of numpy arrays and plain containers; anything else in it raises ``UnpicklingError``."""
    return _SafeUnpickler(file, encoding="latin1").load()


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def read_safe_pickle(path: Path) -> dict[str, Any]:
    """Read a Detectron2 ``.pkl`` without running any code it may hold.

    Raises:
        InputError: the file is missing, or is no pickled dictionary of arrays.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path}: check MODEL.WEIGHTS, or make them with tools/convert_backbone.py")
    try:
        content = safe_unpickle(io.BytesIO(path.read_bytes()))
    except Exception as error:  # a damaged or foreign pickle can fail in any way
        raise InputError(f"{path} is not a pickle that can be read safely ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of arrays")
    return content
