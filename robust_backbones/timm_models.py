"""timm's networks: which there are, how timm feeds them, and how one is built.

timm is imported where one of them is asked for: that takes seconds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from robust_backbones.errors import InputError

STRIDES = (4, 8, 16, 32)
"""Of the stages that a feature pyramid is built on."""


@cache
def is_timm(arch: str) -> bool:
    """Whether timm has a network of this name, with or without a tag of weights."""
    import timm

    return bool(timm.is_model(arch))


def timm_config(arch: str) -> Any:
    """timm's configuration of a network, with ``mean``, ``input_size``, ``crop_pct``, ``classifier`` and more."""
    import timm

    return timm.get_pretrained_cfg(arch, allow_unregistered=True)


def build_timm(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The network with random weights of the global generator, for images of this size where it is made for one.

    Raises:
        InputError: timm has none for such images.
    """
    import timm

    made_for = {"img_size": image_size} if timm_config(arch).fixed_input_size else {}
    try:
        return timm.create_model(arch, num_classes=num_classes, **made_for)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"timm cannot build {arch} for images of {image_size} pixels ({error})") from None


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
    """A convolutional network up to its last stage, with random weights, and which of its intermediate outputs lie at
    strides 4, 8, 16 and 32.

    Args:
        drop_path: how often its last block is left out in training (stochastic depth).

    Raises:
        InputError: it has no such stages, takes images of one size alone, or leaves out no blocks.
    """
    import timm
    from timm.layers import DropPath

    if timm_config(arch).fixed_input_size:
        raise InputError(f"timm's {arch} takes images of one size alone: no backbone of a detector is made of it")
    try:
        network: Any = timm.create_model(arch, num_classes=0, drop_path_rate=drop_path or None)
        dropping = any(isinstance(module, DropPath) for module in network.modules())
    except TypeError:
        dropping = False  # it knows no such argument
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


def keep_paths(network: nn.Module, *, frozen: bool = False) -> None:
    """From now on training leaves out no block, and draws no random number for it; with ``frozen`` no frozen block."""
    from timm.layers import DropPath

    for block in network.modules():
        if not (frozen and any(parameter.requires_grad for parameter in block.parameters())):
            for path in block.children():
                if isinstance(path, DropPath):
                    path.drop_prob = 0.0
