"""From torchvision's tensor names to Detectron2's, with a report of every tensor; pure torch, no detectron2."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from torch import Tensor

from robust_backbones.checkpoint.format import ASSUMED, BY_FILE, BY_USER, READING, Checkpoint, reading
from robust_backbones.checkpoint.names import of_swin, of_vit, translated
from robust_backbones.checkpoint.untrusted import METADATA, read_file
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, only_in_timm, reference_shapes, spec_from
from robust_backbones.runs.files import atomic_path, check_types
from robust_backbones.threat_models import ThreatModel
from robust_backbones.timm_models import build_stages, is_swin
from robust_backbones.timm_vit import is_vit

FORMAT = "robust_backbones.backbone/1"
REST = "rest"
"""The key of ``rest_of``'s tensors in a file; in a ``.safetensors``, with a full stop, their names' prefix."""
SUFFIXES = (".pkl", ".pth", ".safetensors")


@dataclass(frozen=True)
class ConversionReport:
    """What was done with every tensor; the caller judges. Names are torchvision's, except the values of ``renamed``."""

    source: str
    source_sha256: str
    layout: str
    reading: str
    """Preprocessing and stride: mean, std, channel order and stride, each with its origin."""
    renamed: dict[str, str]
    dropped: tuple[str, ...]
    """Not needed by a detector: the classifier, batch norm's counters, and what the file has besides the network."""
    missing: tuple[str, ...]
    """In the architecture, but not in the source."""
    unexpected: tuple[str, ...]
    """In the source, but not in the architecture."""
    incorrect_shapes: tuple[str, ...]
    not_finite: tuple[str, ...]
    """Tensors with a NaN or an infinity."""

    @property
    def ok(self) -> bool:
        return not self._problems()

    def check(self) -> None:
        """Raise ``InputError`` unless ``ok``."""
        if not self.ok:
            raise InputError(f"{self.source} does not hold a whole backbone ({'; '.join(self._problems())})")

    def __str__(self) -> str:
        """A table: tensors by part of the network, and every problem by name."""
        rows = [*Counter(name.split(".")[0] for name in self.renamed.values()).items()]
        rows += [("renamed", len(self.renamed)), ("dropped", len(self.dropped))]
        lines = [f"{part:8} {count:4} tensors" for part, count in rows]
        counted = Counter(_part(name) for name in self.dropped)
        if counted:
            parts = [f"{part} ({count})" for part, count in counted.most_common(12)]
            lines.append(f"left out: {', '.join(parts)}{' ...' * (len(counted) > 12)}")
        return "\n".join([*lines, *self._problems()])

    def _problems(self) -> list[str]:
        problems = ("missing", "unexpected", "incorrect_shapes", "not_finite")
        return [f"{what.replace('_', ' ')}: {', '.join(names)}" for what in problems if (names := getattr(self, what))]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def _part(name: str) -> str:
    """The module that a tensor belongs to, such as ``module.projector`` for ``module.projector.0.weight``."""
    for what, ending in {"counters": "num_batches_tracked", "index tables": "relative_position_index"}.items():
        if name.endswith(ending):
            return what
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "module" else parts[:1])


def detectron2_name(name: str) -> str:
    """Detectron2's name of a torchvision backbone tensor.

    Raises:
        KeyError: no torchvision ResNet has such a tensor, apart from the classifier.
    """
    return translated(name, "torchvision", "detectron2")


def convert(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], ConversionReport]:
    """Rename a backbone's tensors; values do not change (as float32).

    Returns:
        the tensors under Detectron2's names, and the report; the caller judges by ``report.ok``.

    Raises:
        InputError: Detectron2's ResNet cannot represent this backbone.
    """
    checkpoint.spec.detectron2_overrides()  # raises: other networks' tensors have no names there
    spec = checkpoint.spec
    expected, _ = reference_shapes(spec.arch, spec.stem, spec.image_size)
    of_backbone = detectron2_names(spec)
    converted: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    problems: dict[str, list[str]] = {"unexpected": [], "incorrect_shapes": [], "not_finite": []}
    dropped = list(checkpoint.left_out)
    for name, tensor in checkpoint.state_dict.items():
        if name.endswith("num_batches_tracked") or (name in expected and name not in of_backbone):
            dropped.append(name)
        elif name not in expected:
            problems["unexpected"].append(name)
        elif tensor.shape != expected[name]:
            problems["incorrect_shapes"].append(name)
        elif not tensor.isfinite().all():
            problems["not_finite"].append(name)
        else:
            renamed[name] = of_backbone[name]
            converted[renamed[name]] = tensor.float().contiguous()
    report = ConversionReport(
        source=checkpoint.source,
        source_sha256=checkpoint.source_sha256,
        layout=checkpoint.layout,
        reading=checkpoint.reading(),
        renamed=renamed,
        dropped=tuple(dropped),
        missing=tuple(sorted(of_backbone.keys() - checkpoint.state_dict.keys())),
        **{problem: tuple(names) for problem, names in problems.items()},
    )
    return converted, report


def detectron2_names(spec: BackboneSpec) -> dict[str, str]:
    """The tensors that a detector needs, with their names there, among all but the classifier's."""
    expected, classifier = reference_shapes(spec.arch, spec.stem, spec.image_size)
    names = [name for name in expected if not name.startswith(f"{classifier}.")]
    if not only_in_timm(spec.arch):
        return {name: detectron2_name(name) for name in names}
    for is_one, renamed in ((is_vit, of_vit), (is_swin, of_swin)):
        if is_one(spec.arch):
            return {name: new for name in names if (new := renamed(name))}
    with torch.device("meta"):
        up_to_last_stage = build_stages(spec.arch)[0].state_dict()
    return {name: name for name in names if name in up_to_last_stage}


def rest_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a timm network has between its stages and its classifier, such as a last norm: no detector has it, and a
    file keeps it so that the network can be restored."""
    spec = checkpoint.spec
    if not only_in_timm(spec.arch):
        return {}
    expected, classifier = reference_shapes(spec.arch, spec.stem, spec.image_size)
    names = expected.keys() - detectron2_names(spec) - {f"{classifier}.weight", f"{classifier}.bias"}
    return {name: checkpoint.state_dict[name].float() for name in sorted(names & checkpoint.state_dict.keys())}


def convert_file(
    checkpoint: Checkpoint, path: str | Path, *, prove: Callable[[Checkpoint, Path], object] | None = None
) -> ConversionReport:
    """Convert a backbone to Detectron2's format and write it, with its metadata.

    Args:
        checkpoint: from ``sources.read_checkpoint``.
        path: the file to write: .pkl, .pth or .safetensors.
        prove: called with the checkpoint and the written file before the file gets its name; if it raises, there is no
            file, or the old one. ``detection.verify.prove`` is such a function.

    Returns:
        The report. Nothing is written unless ``report.ok``.

    Raises:
        InputError: another suffix; the checkpoint's own file; or as ``convert``.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a converted backbone ends in {' or '.join(SUFFIXES)}, got {path}")
    if checkpoint.path is not None and path.resolve() == checkpoint.path.resolve():
        raise InputError(f"{path} would be overwritten by what is made of it: give another file")
    tensors, report = convert(checkpoint)
    if report.ok:
        with atomic_path(path) as unproven:
            write_backbone(unproven, tensors, BackboneMetadata.of(checkpoint), rest_of(checkpoint))
            if prove is not None:
                prove(checkpoint, unproven)
    return report


@dataclass(frozen=True)
class BackboneMetadata:
    """What a converted file says about itself; the checkpoint guard checks the detector's configuration against it."""

    spec: BackboneSpec
    threat_model: str | None
    layout: str
    source: str
    source_sha256: str
    said: dict[str, str] = field(default_factory=lambda: dict.fromkeys(READING, BY_FILE))
    """As ``Checkpoint.said``; older files without it do not say what was assumed."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BackboneMetadata:
        threat_model = None if checkpoint.threat_model is None else str(checkpoint.threat_model)
        origin = (checkpoint.layout, checkpoint.source, checkpoint.source_sha256, checkpoint.said)
        return cls(checkpoint.spec, threat_model, *origin)

    def reading(self) -> str:
        """Preprocessing and stride, each value with its origin."""
        return reading(self.spec, self.said)

    @classmethod
    def from_dict(cls, content: Any) -> BackboneMetadata:
        """Read what ``to_dict`` wrote.

        Raises:
            InputError: it is not ours, or it is damaged.
        """
        fields = dict(content) if isinstance(content, dict) else {}
        if fields.pop("format", None) != FORMAT:
            raise InputError(f"its backbone metadata is not of the format {FORMAT}")
        fields.pop("overrides", None)  # for readers without this package; the spec gives them again
        spec = spec_from(fields.pop("spec", None))
        if unknown := sorted(map(str, fields.keys() - _TYPES.keys())):
            raise InputError(f"its backbone metadata cannot be read ({', '.join(unknown)})")
        try:
            made = cls(spec, **fields)
            check_types(made, _TYPES)
            if made.said.keys() != {*READING} or not {*made.said.values()} <= {BY_FILE, BY_USER, ASSUMED}:
                raise ValueError("said")
        except (TypeError, ValueError) as error:
            raise InputError(f"its backbone metadata cannot be read ({error})") from None
        if made.threat_model is not None:
            ThreatModel.parse(made.threat_model)
        return made

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "spec": self.spec.to_dict()}


_TYPES = get_type_hints(BackboneMetadata)


def write_backbone(
    path: str | Path, tensors: dict[str, Tensor], metadata: BackboneMetadata, rest: Mapping[str, Tensor] | None = None
) -> None:
    """Write a ``.pkl``, ``.pth`` or ``.safetensors`` by the suffix; identical input gives identical bytes.

    ``rest`` is from ``rest_of``.

    ``matching_heuristics`` lets Detectron2 match ``res2.*`` under any prefix of the detector's backbone.
    """
    fields = {**metadata.to_dict(), "overrides": metadata.spec.detectron2_overrides()}
    content = {"__author__": "robust-backbones", "matching_heuristics": True, "metadata": fields}
    with atomic_path(Path(path)) as temporary:
        if temporary.suffix == ".safetensors":
            _save_safetensors(
                temporary, tensors | {f"{REST}.{name}": tensor for name, tensor in (rest or {}).items()}, fields
            )
            return
        parts = {"model": tensors} | ({REST: dict(rest)} if rest else {})
        if temporary.suffix == ".pth":
            _save_torch(temporary, {**{part: _own(held) for part, held in parts.items()}, **content})
        else:
            arrays = {part: {name: held[name].numpy() for name in sorted(held)} for part, held in parts.items()}
            with open(temporary, "wb") as file:
                pickle.dump({**arrays, **content}, file, protocol=4)


def write_torchvision(path: str | Path, checkpoint: Checkpoint, **strings: str) -> None:
    """Write torchvision's state dict, classifier included, as ``.pth`` or, with the metadata, ``.safetensors``.

    ``strings`` are further metadata of the ``.safetensors``.

    Raises:
        InputError: torchvision's network differs; or its preprocessing does, which a ``.pth`` cannot say.
    """
    path, spec = Path(path), checkpoint.spec
    if only_in_timm(spec.arch):
        raise InputError(f"{spec.arch} is here by timm's names, not by torchvision's: give --to timm")
    if spec.stride_in_1x1 or spec.stem != "imagenet":
        raise InputError(f"torchvision has no {spec.arch} with this stem and stride: keep it in Detectron2's format")
    if path.suffix == ".pth" and (spec.mean, spec.std, spec.channel_order) != (IMAGENET_MEAN, IMAGENET_STD, "RGB"):
        raise InputError(
            f"{path} could not say that its input is {spec.channel_order} with mean {spec.mean} and std {spec.std}: "
            "write a .safetensors"
        )
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            write_described(temporary, checkpoint, **strings)
        else:
            _save_torch(temporary, _own(checkpoint.state_dict))


def write_described(path: Path, checkpoint: Checkpoint, **strings: str) -> None:
    """Write a ``.safetensors`` of all tensors, with their names, the metadata and further strings."""
    _save_safetensors(path, checkpoint.state_dict, BackboneMetadata.of(checkpoint).to_dict(), **strings)


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order of their names, with separate storages: torch.save writes all that a tensor is a view of."""
    return {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}


def _save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], **strings: str) -> None:
    # Preferably one string: several come in any order.
    strings["robust_backbones"] = json.dumps(metadata, sort_keys=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, strings)


def _save_torch(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # given a path, torch.save would write its name into the file
        torch.save(content, file)


def metadata_in(content: Any) -> BackboneMetadata | None:
    """The metadata in a file's content from ``read_file``; None if it is not one of ours.

    Raises:
        InputError: it is damaged.
    """
    if not isinstance(content, dict):
        return None
    if METADATA in content:
        text = content[METADATA].get("robust_backbones") if isinstance(content[METADATA], dict) else None
        try:
            return None if text is None else BackboneMetadata.from_dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"its backbone metadata cannot be read ({error})") from None
    for key in ("metadata", "backbone_metadata"):
        if key in content and isinstance(content.get("model"), dict):
            return BackboneMetadata.from_dict(content[key])
    return None


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], BackboneMetadata]:
    """Read a file of ``write_backbone``: tensors under Detectron2's names, and the metadata.

    Raises:
        InputError: missing, not safely readable, or not made by ``robust-backbones convert``.
    """
    content = read_file(path)
    try:
        metadata = metadata_in(content)
    except InputError as error:
        raise InputError(f"{path}: {error}; convert it again with `robust-backbones convert`") from None
    if metadata is None:
        raise InputError(f"{path} does not say what backbone it holds: convert it with `robust-backbones convert`")
    tensors, _ = apart(content)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}, metadata


def apart(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A converted file's entries of the backbone, and those of ``rest_of`` with their own names."""
    if "model" in content:
        return content["model"], content.get(REST, {})
    rest = {name.removeprefix(f"{REST}."): tensor for name, tensor in content.items() if name.startswith(f"{REST}.")}
    return {name: value for name, value in content.items() if not name.startswith(f"{REST}.")}, rest
