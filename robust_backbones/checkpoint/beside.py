"""Tells heads, which a detector can do without, from modules that a file keeps beside the layers that they change."""

from __future__ import annotations

import re
from itertools import takewhile

from torch import Tensor

from robust_backbones.checkpoint.layouts import Network
from robust_backbones.checkpoint.names import without_wrappers
from robust_backbones.errors import InputError
from robust_backbones.models import reference_shapes

_HEAD = re.compile(r"(?i)aux|class|head|exit|predict|logit|decod|loss|proj|queue|rpn|attacker|^(fc|mlp|linear|lat)")
_INSIDE = re.compile(
    r"(?i)(^|_)(layer|stage|block)s?_?\d|att(n|en)|(^|_)(att|cbam|bam|se|eca|ca|sa|gc|nl|stn|film|gate|prompt|adapt\w*"
    r"|non_?local|denois\w*|swish|p?relu|act)(_?(layer|block|module))?s?_?\d*(_|$)"
)
"""Names of what acts between layers, such as ``layer2_attn``, ``cbam`` and ``prompt``."""


def check_beside(network: Network) -> None:
    """Refuse a module that is left out and may change the features, by its name or by what it takes.

    A head takes what the last stage gives, or a head before it. What takes images, or as many channels as an inner
    stage of a ResNet gives, may stand before layers of the network.
    """
    spec, levels = network.spec, network.prefix.split(".")[:-1]
    shapes, classifier = reference_shapes(spec.arch, spec.stem, spec.image_size)
    last = shapes[f"{classifier}.weight"][1]
    inner = {64, last // 8, last // 4, last // 2} if spec.resnet_shape else set()
    modules: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name in (name for name in network.tensors if name not in network.names):
        parts = without_wrappers(name).split(".")
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(parts[:-1], levels, strict=False))])
        modules.setdefault(tuple(parts[: shared + 1]), {})[name] = network.tensors[name]
    takes = {path: _taken(tensors) for path, tensors in modules.items()}
    named = {path for path in modules if _HEAD.search(path[-1])}
    given, before = {last}, set[int]()
    while given != before:
        before = given
        heads = named | {path for path, own in takes.items() if last in own or not {*own[:1]} & (inner - given)}
        given = given | {tensor.shape[0] for path in heads for tensor in modules[path].values() if tensor.ndim}
    for path in (path for path in modules if path not in named):
        name, reason = next(iter(modules[path])), ""
        if _INSIDE.search(path[-1]) and takes[path][:1] != [last]:
            reason = "by its name"
        elif any(map(_is_of_images, modules[path].values())):
            reason = "as its three channels are those of an image"
        elif path not in heads and len(path) > len(levels):
            reason = f"as it takes the {takes[path][0]} channels of an inner stage"
        if reason:
            raise InputError(
                f"it holds {name}, which {reason} may be a part of the network and change its features, and no "
                f"{spec.arch} has it: if it is a head, give --arch {spec.arch}"
            )


def _taken(tensors: dict[str, Tensor]) -> list[int]:
    """The channels that the weights of a module take, or that its only vectors have."""
    weights = [tensor.shape for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 1]
    return [shape[1] if shape[1] > 1 else shape[0] for shape in weights] or vectors  # 1: it is depthwise


def _is_of_images(tensor: Tensor) -> bool:
    """Whether it can be added to images, or be a convolution that gives such."""
    shape = tensor.shape
    return (
        shape[-3:-2] == (3,) and (tensor.ndim == 3 or (tensor.ndim == 4 and shape[0] in (1, 3))) and tensor.numel() > 3
    )
