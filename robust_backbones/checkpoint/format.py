"""Backbone checkpoints and our own file format; ``sources`` reads those of other libraries."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_backbones.models import BackboneSpec, NormalizedModel, backbone_with, build_backbone
from robust_backbones.runs.files import atomic_path
from robust_backbones.threat_models import ThreatModel

FORMAT = "robust_backbones.checkpoint/1"
TRAINING_FORMAT = "robust_backbones.training/1"
"""Format of the files that a run resumes from; no backbone is read from them."""


READING = ("mean", "std", "channel_order", "stride_in_1x1")
"""The fields of a spec that tensors do not show: a wrong one gives other features without an error."""
BY_FILE, BY_USER, ASSUMED = "said by the file", "said by you", "assumed"


def reading(spec: BackboneSpec, said: Mapping[str, str]) -> str:
    """The values of ``READING``, each with its origin."""
    values = {
        "mean": "mean " + " ".join(f"{value:.6g}" for value in spec.mean),
        "std": "std " + " ".join(f"{value:.6g}" for value in spec.std),
        "channel_order": spec.channel_order,
    }
    if spec.resnet_shape and spec.resnet_shape.has_bottlenecks:
        values["stride_in_1x1"] = f"stride in the {'1x1' if spec.stride_in_1x1 else '3x3'} convolution"
    return ", ".join(f"{value} ({said.get(name, BY_FILE)})" for name, value in values.items())


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as read from any source: torchvision's tensor names, without prefixes."""

    spec: BackboneSpec
    state_dict: dict[str, Tensor]
    threat_model: ThreatModel | None
    """None when the source does not say how the backbone was trained."""
    layout: str
    """The layout of the file: one of ``sources.SOURCES``."""
    source: str
    """File name without folder."""
    source_sha256: str
    said: dict[str, str] = field(default_factory=lambda: dict.fromkeys(READING, BY_FILE))
    """The origin of each value of ``READING`` in ``spec``: ``BY_FILE``, ``BY_USER`` or ``ASSUMED``."""
    key: str = ""
    """Key of the file's dictionary with the tensors; ``state.model`` is nested in another one."""
    prefix: str = ""
    """The prefix in the file of the names of ``state_dict``."""
    left_out: tuple[str, ...] = ()
    """Tensors of the file that are not the network's, by the file's names."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; empty if the file does not say them."""
    path: Path | None = field(default=None, compare=False)
    """The file, in which the proof finds what its authors' code needs."""

    def reading(self) -> str:
        """How images enter the network, each value with who says it."""
        return reading(self.spec, self.said)

    def build(self) -> nn.Module:
        """The network with these weights, in eval mode."""
        return backbone_with(self.spec, self.state_dict).eval()

    def model(self) -> NormalizedModel:
        """The network with its normalisation, in eval mode: images in [0, 1] -> logits."""
        return NormalizedModel(self.build(), self.spec).eval()

    def record_fields(self, **more: str) -> dict[str, Any]:
        """``backbone`` and ``threat_model`` in the ``RunRecord`` of anything made from this backbone."""
        return {
            "backbone": {**self.spec.to_dict(), "source_sha256": self.source_sha256, **more},
            "threat_model": None if self.threat_model is None else str(self.threat_model),
        }

    def in_rgb(self) -> Checkpoint:
        """The same function for RGB images, if this one takes BGR: the stem's input channels are swapped."""
        if self.spec.channel_order == "RGB":
            return self
        with torch.device("meta"):
            stem, _ = next(pair for pair in build_backbone(self.spec).named_modules() if isinstance(pair[1], nn.Conv2d))
        name = f"{stem}.weight"
        spec = replace(self.spec, channel_order="RGB", mean=self.spec.mean[::-1], std=self.spec.std[::-1])
        return replace(self, spec=spec, state_dict={**self.state_dict, name: self.state_dict[name].flip(1)})


def write_checkpoint(
    path: str | Path,
    *,
    spec: BackboneSpec,
    state_dict: dict[str, Tensor],
    threat_model: ThreatModel | None,
    classes: Sequence[str] = (),
) -> None:
    """Write our own format; ``threat_model`` is None if it is unknown how the backbone was trained.

    ``classes`` are as in ``Checkpoint``; further outputs of a larger classifier have no names.
    """
    content = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "threat_model": None if threat_model is None else str(threat_model),
        "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()},
        **({"classes": list(classes)} if classes and len(classes) == spec.num_classes else {}),
    }
    save_tensors(path, content)


def save_tensors(path: str | Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values for ``load_tensors``, atomically.

    The same content gives the same bytes.
    """
    # To a file, not a path: torch.save writes the path's name, here a temporary one, into the archive.
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(_without_identity(content), file)


def _without_identity(value: Any) -> Any:
    """Make equal strings one object and containers separate objects: a pickle shows which of them are identical."""
    if type(value) is str:
        return sys.intern(value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.clear()
        copied.update({_without_identity(key): _without_identity(item) for key, item in value.items()})
        for name, item in getattr(value, "__dict__", {}).items():  # _metadata of a state_dict()
            setattr(copied, name, _without_identity(item))
        return copied
    return type(value)(map(_without_identity, value)) if type(value) in (list, tuple) else value


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
