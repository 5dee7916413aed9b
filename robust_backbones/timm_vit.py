"""How Detectron2's ViT must be built to hold the tensors of timm's plain vision transformers, or why it cannot.

This is read from the network that timm builds, not from its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from robust_backbones.errors import InputError
from robust_backbones.timm_models import build_timm, timm_config

PATCH_SIZE = 16
"""In pixels: the simple feature pyramid makes strides 4 to 32 from the stride 16 of these patches."""


@dataclass(frozen=True)
class ViTShape:
    """What distinguishes plain vision transformers, in Detectron2's terms."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    qkv_bias: bool
    epsilon: float
    """Of its layer norms."""
    embeds_class: bool
    """Whether the first position embedding is that of the class token."""
    has_convstem: bool
    """Whether its patch embedding is a ConvStem (``convstem``)."""


@cache
def is_vit(arch: str) -> bool:
    """Whether a network of timm is one of its plain vision transformers."""
    return bool(timm_config(arch).fixed_input_size) and _plain(_built(arch, timm_config(arch).input_size[-1]))


@cache
def vit_shape(arch: str, image_size: int) -> ViTShape:
    """The shape of timm's vision transformer for square images of this many pixels.

    Raises:
        InputError: it has what Detectron2's ViT lacks, which the message names; or it is not a vision transformer.
    """
    network = _built(arch, image_size)
    if not _plain(network):
        raise InputError(f"timm's {arch} is no plain vision transformer, which Detectron2's ViT would be")
    found = [name for name, is_in in _OF_NETWORKS.items() if is_in(network)]
    blocks = [block for block in network.blocks if hasattr(block, "attn")]
    if found := found + [name for name, is_in in _OF_BLOCKS.items() if any(map(is_in, blocks))]:
        raise InputError(f"Detectron2's ViT cannot be timm's {arch}, which has {', '.join(found)}")
    block = network.blocks[0]
    return ViTShape(
        width=network.embed_dim,
        depth=len(network.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / network.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        epsilon=block.norm1.eps,
        embeds_class=network.has_class_token and not network.no_embed_class,
        has_convstem=_is(network.patch_embed.proj, "ConvStem"),
    )


def without_class_token(network: Any) -> None:
    """Remove the class token of a timm vision transformer, in place: its blocks then attend only to patches."""
    if network.has_class_token and not network.no_embed_class:
        network.pos_embed = nn.Parameter(network.pos_embed.detach()[:, network.num_prefix_tokens :])
    network.cls_token, network.num_prefix_tokens, network.has_class_token = None, 0, False


def _built(arch: str, image_size: int) -> Any:
    with torch.device("meta"):
        return build_timm(arch, 1, image_size)


def _plain(network: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(network, VisionTransformer)


def _has(owner: Any, *names: str) -> bool:
    """Whether one of these modules exists and is not an identity."""
    return any(not isinstance(getattr(owner, name, None), nn.Identity | None) for name in names)


_OF_NETWORKS: dict[str, Callable[[Any], bool]] = {
    f"patches of other than {PATCH_SIZE} pixels": lambda net: {*net.patch_embed.patch_size} != {PATCH_SIZE},
    "a patch embedding that is neither a ConvStem nor a convolution with a bias": lambda net: (
        not (_is(net.patch_embed.proj, "ConvStem") or getattr(net.patch_embed.proj, "bias", None) is not None)
        or _has(net.patch_embed, "norm", "backbone")
    ),
    "a norm before its blocks": lambda net: _has(net, "norm_pre"),
    "register tokens": lambda net: net.num_reg_tokens > 0,
    "a distillation token": lambda net: hasattr(net, "dist_token"),
    "no position embeddings of its own": lambda net: net.pos_embed is None,
    "images that are not square": lambda net: len({*net.patch_embed.grid_size}) > 1,
    "blocks of another kind": lambda net: not all(_is(block, "Block") for block in net.blocks),
}
"""What Detectron2's ViT lacks -> whether a network has it."""
_OF_BLOCKS: dict[str, Callable[[Any], bool]] = {
    "attention of another kind": lambda block: not _is(block.attn, "Attention"),
    "layer scale": lambda block: _has(block, "ls1", "ls2"),
    "norms of queries and keys": lambda block: _has(block.attn, "q_norm", "k_norm"),
    "norms within its attention": lambda block: _has(block.attn, "norm"),
    "norms within its MLP": lambda block: _has(block.mlp, "norm"),
    "an MLP of another kind": lambda block: not _is(block.mlp, "Mlp"),
    "an activation other than GELU": lambda block: (
        type(block.mlp.act) is not nn.GELU or block.mlp.act.approximate != "none"
    ),
    "norms other than layer norms": lambda block: not isinstance(block.norm1, nn.LayerNorm),
    "projections without a bias": lambda block: block.attn.proj.bias is None,
}
"""The same, of one of its blocks."""


def _is(module: nn.Module, kind: str) -> bool:
    return type(module).__name__ == kind
