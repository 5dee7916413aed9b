"""ConvNeXt, Swin and ViT under the names of several libraries, as a table; read under timm's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robust_backbones.checkpoint.names import pattern_of
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, usual_spec
from robust_backbones.timm_models import is_timm


@dataclass(frozen=True, eq=False)
class FamilyNames:
    """How one library names the tensors of one family."""

    library: str
    family: str
    anchor: str
    """The tensor that shows where a network begins."""
    names: Mapping[str, str]
    """Its names -> timm's, with fields of ``_FIELDS``; [0], [1], [2] are parts that timm keeps as one tensor, and an
    empty value is not a weight. Other names do not change."""
    inside: str = ""
    """The prefix of all names but the classifier's."""


def _same(number: int) -> int:
    return number


# Field -> its pattern, and timm's number for the number there.
_FIELDS: dict[str, tuple[str, Callable[[int], int]]] = {
    "odd": ("[1357]", lambda place: (place - 1) // 2),
    "even": ("[246]", lambda place: place // 2),
    "next": (r"\d", lambda stage: stage + 1),
    "stage": (r"\d", _same),
    "block": (r"\d+", _same),
    "tensor": ("weight|bias", _same),
}


def _blocks(before: str, after: str, layers: Mapping[str, str]) -> dict[str, str]:
    """The names of a block's layers: weight and bias of each, or one tensor if the name ends with a full stop."""
    return {
        f"{before}.{old}.{{tensor}}".replace("..{tensor}", ""): f"{after}.{new}.{{tensor}}".replace("..{tensor}", "")
        for old, new in layers.items()
    }


_HF_MLP = {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
# transformers 5 renamed the layers in memory; its files have the old names.
_HF_ATTENTION = {
    **{f"attention.{name}_proj": f"attn.qkv[{part}]" for part, name in enumerate("qkv")},
    **{"attention.o_proj": "attn.proj", "attention.output.dense": "attn.proj"},
    **{"layernorm_before": "norm1", "layernorm_after": "norm2"},
}
_QKV = {name: f"attn.qkv[{part}]" for part, name in enumerate(("query", "key", "value"))}
_SWIN_BUFFERS = {
    rf"layers.{{stage}}.blocks.{{block}}.{name}": "" for name in ("attn.relative_position_index", "attn_mask")
}
_TABLE = "attn.relative_position_bias_table."

FAMILIES = (
    FamilyNames(
        "torchvision",
        "convnext",
        "features.1.0.layer_scale",
        {
            "features.0.{block}.{tensor}": "stem.{block}.{tensor}",
            **_blocks(
                "features.{odd}.{block}",
                "stages.{odd}.blocks.{block}",
                {"block.0": "conv_dw", "block.2": "norm", "block.3": "mlp.fc1", "block.5": "mlp.fc2"}
                | {"layer_scale.": "gamma."},
            ),
            "features.{even}.{block}.{tensor}": "stages.{even}.downsample.{block}.{tensor}",
            **{"classifier.0.{tensor}": "head.norm.{tensor}", "classifier.2.{tensor}": "head.fc.{tensor}"},
        },
    ),
    FamilyNames(
        "torchvision",
        "swin",
        "features.1.0.attn.relative_position_bias_table",
        {
            **{
                "features.0.0.{tensor}": "patch_embed.proj.{tensor}",
                "features.0.2.{tensor}": "patch_embed.norm.{tensor}",
            },
            **_blocks(
                "features.{odd}.{block}",
                "layers.{odd}.blocks.{block}",
                {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj"}
                | {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", _TABLE: _TABLE},
            ),
            "features.{odd}.{block}.attn.relative_position_index": "",
            "features.{even}.reduction.{tensor}": "layers.{even}.downsample.reduction.{tensor}",
            "features.{even}.norm.{tensor}": "layers.{even}.downsample.norm.{tensor}",
            "head.{tensor}": "head.fc.{tensor}",
        },
    ),
    FamilyNames(
        "torchvision",
        "vit",
        "encoder.pos_embedding",
        {
            **{"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"},
            "conv_proj.{tensor}": "patch_embed.proj.{tensor}",
            **_blocks(
                "encoder.layers.encoder_layer_{block}",
                "blocks.{block}",
                {"ln_1": "norm1", "ln_2": "norm2", "self_attention.out_proj": "attn.proj"}
                | {
                    "self_attention.in_proj_weight.": "attn.qkv.weight.",
                    "self_attention.in_proj_bias.": "attn.qkv.bias.",
                }
                # Files from before torchvision 0.13 say linear_1 and linear_2.
                | {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "mlp.linear_1": "mlp.fc1", "mlp.linear_2": "mlp.fc2"},
            ),
            **{"encoder.ln.{tensor}": "norm.{tensor}", "heads.head.{tensor}": "head.{tensor}"},
        },
    ),
    FamilyNames(
        "transformers",
        "convnext",
        "embeddings.patch_embeddings.weight",
        {
            "embeddings.patch_embeddings.{tensor}": "stem.0.{tensor}",
            "embeddings.layernorm.{tensor}": "stem.1.{tensor}",
            **_blocks(
                "encoder.stages.{stage}.layers.{block}",
                "stages.{stage}.blocks.{block}",
                {"dwconv": "conv_dw", "layernorm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
                | {"layer_scale_parameter.": "gamma."},
            ),
            "encoder.stages.{stage}.downsampling_layer.{block}.{tensor}": "stages.{stage}.downsample.{block}.{tensor}",
            **{"layernorm.{tensor}": "head.norm.{tensor}", "classifier.{tensor}": "head.fc.{tensor}"},
        },
        inside="convnext.",
    ),
    FamilyNames(
        "transformers",
        "vit",
        "embeddings.position_embeddings",
        {
            **{"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"},
            "embeddings.patch_embeddings.projection.{tensor}": "patch_embed.proj.{tensor}",
            **_blocks("encoder.layer.{block}", "blocks.{block}", _HF_ATTENTION | _HF_MLP),
            **_blocks("layers.{block}", "blocks.{block}", _HF_ATTENTION | _HF_MLP),
            **_blocks("encoder.layer.{block}.attention.attention", "blocks.{block}", _QKV),
            **{"layernorm.{tensor}": "norm.{tensor}", "classifier.{tensor}": "head.{tensor}"},
            "pooler.dense.{tensor}": "",  # between the network and a head of another kind
        },
        inside="vit.",
    ),
    FamilyNames(
        "transformers",
        "swin",
        "encoder.layers.0.blocks.0.layernorm_before.weight",
        {
            "embeddings.patch_embeddings.projection.{tensor}": "patch_embed.proj.{tensor}",
            "embeddings.norm.{tensor}": "patch_embed.norm.{tensor}",
            **_blocks(
                "encoder.layers.{stage}.blocks.{block}",
                "layers.{stage}.blocks.{block}",
                _HF_ATTENTION
                | _HF_MLP
                | {"attention.self.relative_position_bias_table.": _TABLE}
                | {"attention.relative_position_bias.relative_position_bias_table.": _TABLE},
            ),
            **_blocks("encoder.layers.{stage}.blocks.{block}.attention.self", "layers.{stage}.blocks.{block}", _QKV),
            "encoder.layers.{stage}.blocks.{block}.attention.self.relative_position_index": "",
            "encoder.layers.{next}.downsample.reduction.weight": "layers.{next}.downsample.reduction.weight",
            "encoder.layers.{next}.downsample.norm.{tensor}": "layers.{next}.downsample.norm.{tensor}",
            **{"layernorm.{tensor}": "norm.{tensor}", "classifier.{tensor}": "head.fc.{tensor}"},
        },
        inside="swin.",
    ),
    # The authors' own repository.
    FamilyNames(
        "the authors of ConvNeXt",
        "convnext",
        "downsample_layers.0.0.weight",
        {
            "downsample_layers.0.{block}.{tensor}": "stem.{block}.{tensor}",
            "downsample_layers.{stage}.{block}.{tensor}": "stages.{stage}.downsample.{block}.{tensor}",
            **_blocks(
                "stages.{stage}.{block}",
                "stages.{stage}.blocks.{block}",
                {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "gamma.": "gamma."},
            ),
            **{"norm.{tensor}": "head.norm.{tensor}", "head.{tensor}": "head.fc.{tensor}"},
        },
    ),
    # timm before 0.9 has the authors' names of Swin: a stage ends with the reduction that the next one begins with. So
    # have RobustBench's Liu2023 and ARES's files.
    FamilyNames(
        "timm",
        "swin",
        "layers.0.downsample.norm.weight",
        {
            "layers.{next}.downsample.norm.{tensor}": "layers.{next}.downsample.norm.{tensor}",
            "layers.{next}.downsample.reduction.weight": "layers.{next}.downsample.reduction.weight",
            "head.{tensor}": "head.fc.{tensor}",
            **_SWIN_BUFFERS,
        },
    ),
    FamilyNames("timm", "swin", "layers.0.blocks.0.attn.relative_position_bias_table", _SWIN_BUFFERS),
    FamilyNames("timm", "convnext", "stages.0.blocks.0.conv_dw.weight", {}),
    FamilyNames("timm", "vit", "pos_embed", {}),
)

# Family, channels of its first blocks, blocks (of ConvNeXt and Swin: in the third stage) -> timm's name.
SIZES = {
    **{("convnext", 96, 9): "convnext_tiny", ("convnext", 96, 27): "convnext_small"},
    **{("convnext", 128, 27): "convnext_base", ("convnext", 192, 27): "convnext_large"},
    **{("convnext", 256, 27): "convnext_xlarge"},
    **{("swin", 96, 6): "swin_tiny", ("swin", 96, 18): "swin_small"},
    **{("swin", 128, 18): "swin_base", ("swin", 192, 18): "swin_large"},
    **{("vit", 192, 12): "vit_tiny", ("vit", 384, 12): "vit_small", ("vit", 768, 12): "vit_base"},
    **{("vit", 1024, 24): "vit_large", ("vit", 1280, 32): "vit_huge"},
}
_THIRD_STAGE = {
    "convnext": r"stages\.2\.blocks\.(\d+)\.",
    "swin": r"layers\.2\.blocks\.(\d+)\.",
    "vit": r"blocks\.(\d+)\.",
}
_WINDOWS = {7: "patch4_window7_224", 12: "patch4_window12_384"}
_CONV_STEM = {"convnext": "stem.stem.0.weight", "vit": "patch_embed.proj.stem.0.weight"}

TORCHVISION = {
    **{name: name for name in ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")},
    **{f"swin_{size}_patch4_window7_224": f"swin_{size[0]}" for size in ("tiny", "small", "base")},
    **{f"vit_{size}_patch{patch}_224": f"vit_{size[0]}_{patch}" for size in ("base", "large") for patch in (16, 32)},
    "vit_huge_patch14_224": "vit_h_14",
}
"""timm's name -> torchvision's, of the same network."""


def renamed(names: Iterable[str], row: FamilyNames) -> dict[str, str]:
    """A library's names -> timm's, without those that are not weights.

    Args:
        names: without the network's prefix.
    """
    found = {}
    for name in names:
        short = name.removeprefix(row.inside)
        for pattern, target in _patterns(row):
            if match := pattern.fullmatch(short):
                values = {k: v if k == "tensor" else _FIELDS[k][1](int(v)) for k, v in match.groupdict().items()}
                short = target.format(**values)
                break
        if short:
            found[name] = short
    return found


@cache
def _patterns(row: FamilyNames) -> tuple[tuple[re.Pattern[str], str], ...]:
    fields = {field: pattern for field, (pattern, _) in _FIELDS.items()}
    return tuple((pattern_of(name, fields), target) for name, target in row.names.items())


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of ``renamed``: parts become one tensor, and ConvNeXt's scales have one dimension."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"(.+)\[(\d)\](.*)", name):
            parts.setdefault(part[1] + part[3], {})[int(part[2])] = tensor
        else:
            found[name] = tensor.flatten() if re.fullmatch(r"stages\.\d\.blocks\.\d+\.gamma", name) else tensor
    for name, pieces in parts.items():
        if sorted(pieces) != [0, 1, 2]:
            raise InputError(f"it holds only a part of {name}: query, key and value belong together")
        found[name] = torch.cat([pieces[part] for part in range(3)])
    return found


def spec_of(row: FamilyNames, tensors: Mapping[str, Tensor]) -> BackboneSpec:
    """Which timm network these tensors (under timm's names) are, recognised by their shapes.

    Its mean and std are timm's, as the file does not say them; torchvision's have the size of torchvision's evaluation.

    Raises:
        InputError: timm has no such network.
    """
    try:
        width = {
            "convnext": lambda: tensors["stages.0.blocks.0.conv_dw.weight"].shape[0],
            "swin": lambda: tensors["layers.0.blocks.0.norm1.weight"].shape[0],
            "vit": lambda: tensors["pos_embed"].shape[-1],
        }[row.family]()
        depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(_THIRD_STAGE[row.family], name)))
        arch, size = SIZES.get((row.family, width, depth), ""), 0
        conv_stem = _CONV_STEM.get(row.family) in tensors
        if arch and row.family == "swin":
            window = (int(tensors["layers.0.blocks.0.attn.relative_position_bias_table"].shape[0] ** 0.5) + 1) // 2
            arch = f"{arch}_{_WINDOWS.get(window, f'window{window}')}"
        elif arch and row.family == "vit":
            patch = 16 if conv_stem else tensors["patch_embed.proj.weight"].shape[-1]
            size = patch * int((tensors["pos_embed"].shape[1] - 1) ** 0.5)
            arch = f"{arch}_patch{patch}_224"
    except (KeyError, IndexError, ValueError):
        raise InputError(
            f"it has some of the tensors of a {row.family} by the names of {row.library}, not all"
        ) from None
    arch += "_convstem" * conv_stem
    if not is_timm(arch):
        raise InputError(f"timm has no {row.family} of {width} channels and {depth} blocks{f' ({arch})' * bool(arch)}")
    spec = usual_spec(arch)
    if size and size != spec.image_size:
        spec = replace(spec, image_size=size, val_resize=size * spec.val_resize // spec.image_size)
    return _as_torchvision(spec) if row.library == "torchvision" else spec


def _as_torchvision(spec: BackboneSpec) -> BackboneSpec:
    """With the sizes and the interpolation that torchvision says of its own weights."""
    from torchvision.models import get_model_weights

    if spec.arch not in TORCHVISION:
        return spec
    says: Any = get_model_weights(TORCHVISION[spec.arch])["IMAGENET1K_V1"].transforms()
    return replace(spec, val_resize=says.resize_size[0], interpolation=says.interpolation.value)
