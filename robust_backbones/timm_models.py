"""timm's networks: their names, their preprocessing, and how one is built.

timm is imported only when one of them is used: the import takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from robust_backbones.errors import InputError

STRIDES = (4, 8, 16, 32)
"""The strides of the stages that a feature pyramid is built on."""


@cache
def is_timm(arch: str) -> bool:
    """Whether timm has a network of this name, with or without a tag of weights."""
    return bool(_timm().is_model(arch)) and timm_config(arch) is not None  # as of names that it has given up


def timm_names() -> list[str]:
    """The names of all its networks, without tags of weights."""
    return _timm().list_models()


def current_name(arch: str) -> str:
    """timm's present name of a network, without a tag, for one of earlier versions; others do not change."""
    return (_timm().models.get_deprecated_models().get(arch) or arch).split(".")[0]


def _timm() -> Any:
    """timm, with the networks of ``convstem`` in its registry."""
    import timm

    from robust_backbones import convstem  # noqa: F401

    return timm


def timm_config(arch: str) -> Any:
    """timm's configuration of a network, with ``mean``, ``input_size``, ``crop_pct``, ``classifier`` and more."""
    return _timm().get_pretrained_cfg(arch, allow_unregistered=True)


def build_timm(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The network with random weights from the global generator, for images of this size if it accepts only one.

    Raises:
        InputError: timm has none for such images.
    """
    made_for = {"img_size": image_size} if timm_config(arch).fixed_input_size else {}
    try:
        return _timm().create_model(arch, num_classes=num_classes, **made_for)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"timm cannot build {arch} for images of {image_size} pixels ({error})") from None


def set_norm_epsilon(network: nn.Module, epsilon: float) -> None:
    """Set the epsilon of the layer norms, if it is not 0; in a ConvNeXt only of the last one, as transformers does."""
    from timm.models.convnext import ConvNeXt

    for name, module in network.named_modules() if epsilon else ():
        if isinstance(module, nn.LayerNorm) and (name == "head.norm" or not isinstance(network, ConvNeXt)):
            module.eps = epsilon


class NormAndHeads(NamedTuple):
    """Properties of a timm network that its tensors do not show."""

    norm_epsilon: float
    """Of its last layer norm; 0 if it has none."""
    heads: int
    """Of its first attention layer; 0 if it has none."""


@cache
def norm_and_heads(arch: str) -> NormAndHeads:
    """Those of the network with this name."""
    with torch.device("meta"):
        modules = [*build_timm(arch, 1, timm_config(arch).input_size[-1]).modules()]
    norms = [module.eps for module in modules if isinstance(module, nn.LayerNorm)]
    heads = [heads for module in modules if isinstance(heads := getattr(module, "num_heads", None), int)]
    return NormAndHeads(norms[-1] if norms else 0.0, heads[0] if heads else 0)


def timm_classifier(arch: str, network: nn.Module) -> str:
    """The name of a network's classifier.

    Raises:
        InputError: it is not one linear layer.
    """
    name = timm_config(arch).classifier
    if isinstance(name, str) and isinstance(dict(network.named_modules()).get(name), nn.Linear):
        return name
    raise InputError(f"the classifier of timm's {arch} is not one linear layer: it cannot be used here")


def build_stages(arch: str, *, drop_path: float = 0.0) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolutional network up to its last stage, with random weights, and which of its intermediate outputs have
    strides 4, 8, 16 and 32.

    Args:
        drop_path: probability of dropping its last block in training (stochastic depth).

    Raises:
        InputError: it has no such stages, accepts only one image size, or does not support stochastic depth.
    """
    from timm.layers import DropPath

    if timm_config(arch).fixed_input_size:
        raise InputError(f"timm's {arch} takes images of one size alone: no backbone of a detector is made of it")
    try:
        network: Any = _timm().create_model(arch, num_classes=0, drop_path_rate=drop_path or None)
        dropping = any(isinstance(module, DropPath) for module in network.modules())
    except TypeError:
        dropping = False  # it knows no such argument
    if not drop_path:
        keep_paths(network)  # some leave out blocks by themselves
    if drop_path and not dropping:
        raise InputError(f"timm's {arch} leaves out no blocks: give MODEL.BACKBONE.DROP_PATH 0.0")
    places = {one["reduction"]: place for place, one in enumerate(network.feature_info)}
    if not (places.keys() >= set(STRIDES) and hasattr(network, "prune_intermediate_layers")):
        raise InputError(f"timm's {arch} has no stages at strides 4, 8, 16 and 32: no feature pyramid is made of it")
    indices = tuple(places[stride] for stride in STRIDES)
    network.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    return network, indices


def stage_layers(network: Any) -> tuple[str, ...]:
    """The modules whose outputs are the stages at strides 4, 8, 16 and 32."""
    layers = {one["reduction"]: one["module"] for one in network.feature_info}
    return tuple(layers[stride] for stride in STRIDES)


def is_swin(arch: str) -> bool:
    """Whether a network of timm is one of its Swin Transformers, of the first version."""
    return type(_without_weights(arch)).__name__ == "SwinTransformer"


@cache
def _without_weights(arch: str) -> nn.Module:
    """The network without a classifier, on the meta device: tensors with shapes but no values."""
    with torch.device("meta"):
        return _timm().create_model(arch, num_classes=0)


@dataclass(frozen=True)
class SwinShape:
    """What distinguishes Swin Transformers (Liu et al. 2021), in Detectron2's terms."""

    embed_dim: int
    """Channels of the first stage; each further stage has twice as many."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    num_heads: tuple[int, ...]
    window_size: int
    """In tokens a side."""


def swin_shape(arch: str) -> SwinShape:
    """The shape of one of timm's Swin Transformers.

    Raises:
        InputError: its windows are not square and of one size, as Detectron2's are.
    """
    stages: Any = _without_weights(arch).layers
    windows = {block.attn.window_size for stage in stages for block in stage.blocks}
    if len({side for window in windows for side in window}) != 1:
        found = " and ".join("x".join(map(str, window)) for window in sorted(windows))
        raise InputError(
            f"timm's {arch} has windows of {found} tokens, and Detectron2's Swin has square ones of one size"
        )
    attention = [stage.blocks[0].attn for stage in stages]
    return SwinShape(
        embed_dim=attention[0].dim,
        depths=tuple(len(stage.blocks) for stage in stages),
        num_heads=tuple(one.num_heads for one in attention),
        window_size=windows.pop()[0],
    )


def keep_paths(network: nn.Module, *, frozen: bool = False) -> None:
    """Turn off stochastic depth, so that training draws no random numbers for it; ``frozen``: only in frozen blocks."""
    from timm.layers import DropPath

    for block in network.modules():
        if not (frozen and any(parameter.requires_grad for parameter in block.parameters())):
            for path in block.children():
                if isinstance(path, DropPath):
                    path.drop_prob = 0.0
