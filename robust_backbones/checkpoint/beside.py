"""What a file contains besides a network: heads, which a detector does not need, and possible parts of the network."""

from __future__ import annotations

import re

from torch import Tensor

from robust_backbones.checkpoint.layouts import Network
from robust_backbones.checkpoint.names import without_wrappers
from robust_backbones.errors import InputError
from robust_backbones.models import reference_shapes

_AFTER = r"aux|classif|predict|logit|deco[dn]|loss|queue|rpn|attacker"
_HEAD = re.compile(rf"(?i){_AFTER}|class|(?<!multi)head|exit|proj(?!_?\d)|^(fc|mlp|linear|lat)")
_ACTS = re.compile(
    r"(?i)att(n|en)|(^|_)(att|cbam|bam|se|eca|ca|sa|gc|nl|stn|film|gate|prompt|adapt\w*"
    r"|non_?local|denois\w*|swish|p?relu|act)(_?(layer|block|module))?s?_?\d*(_|$)"
)
"""Names of modules between layers, such as ``layer2_attn``, ``cbam`` and ``prompt``; ``fc_attn2`` is not a head."""
_PLACE = re.compile(r"(?i)(^|_)(layer|stage|block)s?_?\d")


def check_left_out(network: Network) -> None:
    """Refuse a left-out module that may change the features, judging by its name or its input channels.

    The input of a head is the last stage's output, or another head's. A module that takes images, or as many channels
    as an inner stage of a ResNet has, may be in front of layers of the network.
    """
    spec, levels = network.spec, network.prefix.split(".")[:-1]
    shapes, classifier = reference_shapes(spec.arch, spec.stem, spec.image_size)
    last = shapes[f"{classifier}.weight"][1]
    inner = {64, last // 8, last // 4, last // 2} if spec.resnet_shape else set()
    modules: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name in (name for name in network.tensors if name not in network.names):
        parts = without_wrappers(name).split(".")
        modules.setdefault(tuple(parts[: network.shared_levels(parts[:-1]) + 1]), {})[name] = network.tensors[name]
    takes = {path: _taken(tensors) for path, tensors in modules.items()}
    acting = {path for path in modules if _ACTS.search(path[-1]) and not re.search(f"(?i){_AFTER}", path[-1])}
    named = {path for path in modules.keys() - acting if _HEAD.search(path[-1])}
    inside = acting | {path for path in modules.keys() - named if _PLACE.search(path[-1])}
    given, before = {last}, set[int]()
    while given != before:
        before = given
        after = {path for path, own in takes.items() if last in own or not {*own[:1]} & (inner - given)} - inside
        # Beside the layers of the network, such a name is doubted but after the last stage.
        named_inside = {path for path in inside if {*takes[path][:1]} & (given if len(path) <= len(levels) else {last})}
        heads = named | after | (named_inside if inner else set())
        given = given | {tensor.shape[0] for path in heads for tensor in modules[path].values() if tensor.ndim}
    for path in (path for path in modules if path not in named):
        name, reason = next(iter(modules[path])), ""
        if path in inside - heads:
            reason = "by its name"
        elif _makes_images(modules[path]):
            reason = "as its three channels are those of an image"
        elif path not in heads and len(path) > len(levels):
            reason = f"as it takes the {takes[path][0]} channels of an inner stage"
        if reason:
            raise InputError(
                f"it holds {name}, which {reason} may be a part of the network and change its features, and no "
                f"{spec.arch} has it: if it is a head, give --arch {spec.arch}"
            )


def _taken(tensors: dict[str, Tensor]) -> list[int]:
    """The input channels of a module's weights, or the length of its vectors if it has nothing else."""
    weights = [tensor.shape for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor.shape[0] for tensor in tensors.values() if tensor.ndim == 1]
    return [shape[1] if shape[1] > 1 else shape[0] for shape in weights] or vectors  # 1: it is depthwise


def _makes_images(tensors: dict[str, Tensor]) -> bool:
    """Whether a module can be added to images, normalises their channels, or maps images to images."""
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if {*shapes} <= {(3,), ()} and len(
        [name for name in tensors if re.search(r"(^|\.)(weight|bias|running_mean|running_var)$", name)]
    ) > 1:
        return True
    if any(shape[-3:-2] == (3,) and shape[:-3] in ((), (1,)) and shape[-2:] != (1, 1) for shape in shapes):
        return True
    kernels = [shape for shape in shapes if len(shape) == 4]
    last = [shape for shape in kernels if shape[0] == 3 and (shape[1] == 3 or shape[-1] > 1)]
    return bool(last) and any(shape[1] == 3 for shape in kernels)
