"""Tables of the tensor names of several libraries; this package uses torchvision's, or timm's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Naming:
    """How one library names the tensors of a ResNet, with offsets of its numbering."""

    names: tuple[str, str, str, str, str, str]
    """A convolution and its norm each: in the stem, in a block, in a shortcut."""
    stage: int = 0
    """Offset to torchvision's number of a stage (1 to 4)."""
    i: int = 0
    """Offset to torchvision's number of a convolution (1 to 3)."""
    anchor: str = ""
    """The tensor that shows where a network begins."""
    parts: str = ""
    """A pattern of all names that belong to the network, including those that no torchvision ResNet has."""


NAMINGS = {
    "torchvision": Naming(
        (
            "conv1.weight",
            "bn1.{tensor}",
            "layer{stage}.{block}.conv{i}.weight",
            "layer{stage}.{block}.bn{i}.{tensor}",
            "layer{stage}.{block}.downsample.0.weight",
            "layer{stage}.{block}.downsample.1.{tensor}",
        ),
        anchor="layer1.0.conv1.weight",
        parts=r"(conv|bn|gn|norm|layer|stem|maxpool|relu|act|prelu)\d*\.",
    ),
    "detectron2": Naming(
        (
            "stem.conv1.weight",
            "stem.conv1.norm.{tensor}",
            "res{stage}.{block}.conv{i}.weight",
            "res{stage}.{block}.conv{i}.norm.{tensor}",
            "res{stage}.{block}.shortcut.weight",
            "res{stage}.{block}.shortcut.norm.{tensor}",
        ),
        stage=1,
        anchor="stem.conv1.weight",
        parts=r"stem\.conv|res\d\.",
    ),
    "transformers": Naming(
        (
            "embedder.embedder.convolution.weight",
            "embedder.embedder.normalization.{tensor}",
            "encoder.stages.{stage}.layers.{block}.layer.{i}.convolution.weight",
            "encoder.stages.{stage}.layers.{block}.layer.{i}.normalization.{tensor}",
            "encoder.stages.{stage}.layers.{block}.shortcut.convolution.weight",
            "encoder.stages.{stage}.layers.{block}.shortcut.normalization.{tensor}",
        ),
        stage=-1,
        i=-1,
        anchor="embedder.embedder.convolution.weight",
        parts=r"(embedder|encoder)\.",
    ),
    # nn.Sequential(*net.children()): the third and the fourth child, ReLU and max-pool, have no tensors.
    "sequential": Naming(
        (
            "0.weight",
            "1.{tensor}",
            "{stage}.{block}.conv{i}.weight",
            "{stage}.{block}.bn{i}.{tensor}",
            "{stage}.{block}.downsample.0.weight",
            "{stage}.{block}.downsample.1.{tensor}",
        ),
        stage=3,
        anchor="4.0.conv1.weight",
        parts=r"[0-7]\.",
    ),
}


def translated(name: str, source: str, target: str) -> str:
    """A tensor's name in another of ``NAMINGS``.

    Raises:
        KeyError: no ResNet has such a tensor, apart from the classifier.
    """
    old, new = NAMINGS[source], NAMINGS[target]
    for pattern, row in zip(_patterns(source), new.names, strict=True):
        if match := pattern.fullmatch(name):
            fields: dict[str, Any] = match.groupdict()
            for number in ("stage", "i"):
                if number in fields:
                    fields[number] = int(fields[number]) + getattr(new, number) - getattr(old, number)
            return row.format(**fields)
    raise KeyError(name)


@cache
def _patterns(naming: str) -> tuple[re.Pattern[str], ...]:
    fields = {"tensor": r"\w+", **dict.fromkeys(("stage", "block", "i"), r"\d+")}
    return tuple(pattern_of(name, fields) for name in NAMINGS[naming].names)


def pattern_of(name: str, fields: Mapping[str, str]) -> re.Pattern[str]:
    """The pattern of a name with fields in braces, each with the pattern of its values, as a group."""
    groups = {rf"\{{{field}\}}": f"(?P<{field}>{pattern})" for field, pattern in fields.items()}
    return re.compile(re.sub(r"\\\{\w+\\\}", lambda field: groups[field[0]], re.escape(name)))


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts inserted by torch.compile, FSDP and activation checkpointing."""
    return re.sub(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)


def of_caffe2(blob: str) -> str | None:
    """torchvision's name of a blob in Detectron's and Detectron2's ``.pkl`` files; None if it is not in a backbone."""
    layers = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
    endings = {
        **{"w": "weight", "bn_s": "norm.weight", "bn_gamma": "norm.weight", "bn_b": "norm.bias"},
        **{"bn_beta": "norm.bias", "bn_rm": "norm.running_mean", "bn_running_mean": "norm.running_mean"},
        **{"bn_riv": "norm.running_var", "bn_running_var": "norm.running_var"},
    }
    ending = "|".join(endings)
    if match := re.fullmatch(rf"res(\d)_(\d+)_branch(1|2[abc])_({ending})", blob):
        stage, block, layer, last = match.groups()
        return translated(f"res{stage}.{block}.{layers[layer]}.{endings[last]}", "detectron2", "torchvision")
    if match := re.fullmatch(rf"(?:res_)?conv1_({ending})", blob):
        return translated(f"stem.conv1.{endings[match[1]]}", "detectron2", "torchvision")
    return None


# Of EfficientNet-PyTorch -> timm's, for layers outside the blocks and in them.
_EFFICIENTNET = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EFFICIENTNET_BLOCK = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
# A block that does not expand its channels has one layer less.
_NOT_EXPANDING = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def of_efficientnet(names: Collection[str], reference: Iterable[str]) -> dict[str, str]:
    """EfficientNet-PyTorch's names -> timm's; names that the network does not have do not change.

    Args:
        reference: timm's names, whose blocks are numbered within stages.
    """
    blocks = list(dict.fromkeys(found[0] for name in reference if (found := re.match(r"blocks\.\d+\.\d+", name))))
    renamed = {}
    for name in names:
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number, layer, tensor = int(match[1]), match[2], match[3]
            expands = f"_blocks.{number}._expand_conv.weight" in names
            block = blocks[number] if number < len(blocks) else f"blocks.{number}"
            renamed[name] = f"{block}.{(_EFFICIENTNET_BLOCK if expands else _NOT_EXPANDING).get(layer, layer)}.{tensor}"
        else:
            layer, _, tensor = name.partition(".")
            renamed[name] = f"{_EFFICIENTNET.get(layer, layer)}.{tensor}"
    return renamed


_VIT_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
# timm's names -> those of Detectron2's ViT, whose layers have the same.
_VIT = {r"pos_embed": "pos_embed", r"patch_embed\.proj\.(.+)": r"patch_embed.proj.\1"} | {
    rf"blocks\.(\d+)\.{re.escape(layer)}\.(weight|bias)": rf"blocks.\1.{layer}.\2" for layer in _VIT_LAYERS
}


def of_vit(name: str) -> str | None:
    """The name in Detectron2's ViT of a tensor of timm's vision transformer; None for tensors that it does not have:
    the class token, the norm after the last block, pooling and the classifier."""
    found = ((re.fullmatch(pattern, name), new) for pattern, new in _VIT.items())
    return next((match.expand(new) for match, new in found if match), None)


def of_swin(name: str) -> str | None:
    """Detectron2's name of a tensor of timm's Swin; None for the last norm and the classifier.

    timm merges patches at the start of a stage, Detectron2 at the end of the previous one.
    """
    if name.startswith(("head.", "norm.")):
        return None
    return re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
