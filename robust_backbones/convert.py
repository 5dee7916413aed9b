"""From torchvision's tensor names to Detectron2's, with a report of every tensor; pure torch, no detectron2."""

from __future__ import annotations

import pickle
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_backbones.checkpoints import Checkpoint, read_safe_pickle
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.records import atomic_path

FORMAT = "robust_backbones.backbone/1"

# torchvision's name -> Detectron2's. Both count blocks and convolutions alike; stages are shifted by one.
_RENAMES = (
    (re.compile(r"conv1\.weight"), r"stem.conv1.weight"),
    (re.compile(r"bn1\.(\w+)"), r"stem.conv1.norm.\1"),
    (re.compile(r"layer(\d)\.(\d+)\.conv(\d)\.weight"), r"res{stage}.\2.conv\3.weight"),
    (re.compile(r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)"), r"res{stage}.\2.conv\3.norm.\4"),
    (re.compile(r"layer(\d)\.(\d+)\.downsample\.0\.weight"), r"res{stage}.\2.shortcut.weight"),
    (re.compile(r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)"), r"res{stage}.\2.shortcut.norm.\3"),
)


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor. Names are torchvision's, except for the values of ``renamed``."""

    source: str
    source_sha256: str
    renamed: dict[str, str]
    dropped: tuple[str, ...]
    """Of no use to a detector: the classifier, and batch norm's counters."""
    missing: tuple[str, ...]
    """The architecture has them, the source does not."""
    unexpected: tuple[str, ...]
    """The source has them, the architecture does not."""
    incorrect_shapes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.incorrect_shapes)

    def __str__(self) -> str:
        lines = [f"{len(self.renamed)} tensors renamed, {len(self.dropped)} dropped (classifier, counters)"]
        for problem in ("missing", "unexpected", "incorrect_shapes"):
            if names := getattr(self, problem):
                lines.append(f"{problem.replace('_', ' ')}: {', '.join(names)}")
        return "\n".join(lines)


def detectron2_name(name: str) -> str | None:
    """Detectron2's name of a torchvision backbone tensor; None for what a detector has no use for."""
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    for pattern, template in _RENAMES:
        if match := pattern.fullmatch(name):
            stage = int(match[1]) + 1 if "{stage}" in template else 0
            return match.expand(template.replace("{stage}", str(stage)))
    raise KeyError(name)


def convert(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], ConversionReport]:
    """Rename a backbone's tensors; values are left as they are (float32, numpy).

    Returns:
        the tensors under Detectron2's names, and the report; the caller judges by ``report.ok``.

    Raises:
        InputError: Detectron2's ResNet cannot be this backbone.
    """
    checkpoint.spec.detectron2_overrides()  # raises: other networks' tensors have no names there
    expected = {name: tensor.shape for name, tensor in build_backbone(checkpoint.spec).state_dict().items()}
    converted, renamed, dropped, unexpected, incorrect_shapes = {}, {}, [], [], []
    for name, tensor in checkpoint.state_dict.items():
        if name not in expected:
            unexpected.append(name)
        elif (new_name := detectron2_name(name)) is None:
            dropped.append(name)
        elif tensor.shape != expected[name]:
            incorrect_shapes.append(name)
        else:
            renamed[name] = new_name
            converted[new_name] = tensor.float().numpy()
    wanted = {name for name in expected if detectron2_name(name) is not None}
    report = ConversionReport(
        source=checkpoint.source,
        source_sha256=checkpoint.source_sha256,
        renamed=renamed,
        dropped=tuple(dropped),
        missing=tuple(sorted(wanted - set(checkpoint.state_dict))),
        unexpected=tuple(unexpected),
        incorrect_shapes=tuple(incorrect_shapes),
    )
    return converted, report


@dataclass(frozen=True)
class BackboneMetadata:
    """What a converted file says about itself; the checkpoint guard holds the detector's configuration to it."""

    spec: BackboneSpec
    threat_model: str | None
    layout: str
    source: str
    source_sha256: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BackboneMetadata:
        threat_model = None if checkpoint.threat_model is None else str(checkpoint.threat_model)
        return cls(checkpoint.spec, threat_model, checkpoint.layout, checkpoint.source, checkpoint.source_sha256)

    @classmethod
    def from_dict(cls, content: Any) -> BackboneMetadata:
        """Read what ``to_dict`` wrote.

        Raises:
            InputError: it is not ours, or is damaged.
        """
        try:
            fields = dict(content)
            if fields.pop("format") != FORMAT:
                raise KeyError("format")
            return cls(spec=BackboneSpec(**fields.pop("spec")), **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"its backbone metadata cannot be read ({error!r})") from None

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "spec": self.spec.to_dict()}


def write_backbone(path: Path, tensors: dict[str, np.ndarray], metadata: BackboneMetadata) -> None:
    """Write a ``.pkl`` as Detectron2 reads it; identical input gives identical bytes.

    ``matching_heuristics`` lets Detectron2 put ``res2.*`` under whatever prefix the detector gives its backbone.
    """
    content = {
        "model": {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)},
        "__author__": "robust-backbones",
        "matching_heuristics": True,
        "metadata": metadata.to_dict(),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=4)


def read_backbone(path: Path) -> tuple[dict[str, np.ndarray], BackboneMetadata]:
    """Read a file of ``write_backbone``: tensors under Detectron2's names, and the metadata.

    Raises:
        InputError: missing, not safely readable, or not made by ``tools/convert_backbone.py``.
    """
    content = read_safe_pickle(path)
    if not (isinstance(content.get("model"), dict) and "metadata" in content):
        raise InputError(f"{path} does not say what backbone it holds: convert it with tools/convert_backbone.py")
    try:
        return content["model"], BackboneMetadata.from_dict(content["metadata"])
    except InputError as error:
        raise InputError(f"{path}: {error}; convert it again with tools/convert_backbone.py") from None
