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


def build_stages(arch: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolutional network up to its last stage, with random weights, and which of its intermediate outputs lie at
    strides 4, 8, 16 and 32.

    Raises:
        InputError: it has no such stages, or takes images of one size alone.
    """
    import timm

    if timm_config(arch).fixed_input_size:
        raise InputError(f"timm's {arch} takes images of one size alone: no backbone of a detector is made of it")
    network: Any = timm.create_model(arch, num_classes=0)
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
