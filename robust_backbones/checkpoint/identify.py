"""Recognises the network of a file's tensors by their shapes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, is_counter, reference_shapes, usual_spec

OF_TIMM = "; of another network of timm, give its name (--arch NAME, --mean, --std, --channel-order)"


def identify(state_dict: dict[str, Tensor], named: BackboneSpec | None = None) -> BackboneSpec:
    """The architecture, stem and number of classes of a torchvision-named network, recognised by its tensors' shapes.

    Values that no tensor shows (``mean``, ``std``, ``channel_order``, ``stride_in_1x1``) are torchvision's in the spec.

    Args:
        named: the timm network that the file names; the tensors must then be its own, under timm's names.

    Raises:
        InputError: no known architecture has exactly these tensors.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not is_counter(name)}
    stem = "cifar" if shapes.get("conv1.weight") == (64, 3, 3, 3) else "imagenet"
    nearest: tuple[float, str] = (-1.0 if named else 0.9, "")  # a share of equal tensors, and what differs
    is_resnet = any(name.startswith("layer1.") for name in shapes)
    candidates = [arch for arch, shape in ARCHITECTURES.items() if bool(shape) == is_resnet]
    for arch in candidates if named is None else [named.arch]:
        reference, classifier = reference_shapes(arch, stem, named.image_size if named else 224)
        weight, bias = f"{classifier}.weight", f"{classifier}.bias"
        body = {name: shape for name, shape in reference.items() if name not in (weight, bias)}
        num_classes, *_ = shapes.get(weight) or (0,)
        if num_classes and shapes == body | {weight: (num_classes, reference[weight][1]), bias: (num_classes,)}:
            return replace(named, num_classes=num_classes) if named else usual_spec(arch, num_classes, stem=stem)
        if shapes == body and (named or ARCHITECTURES.get(arch)):
            return replace(named, num_classes=0) if named else usual_spec(arch, 0, stem=stem)
        equal = sum(shapes.get(name) == shape for name, shape in body.items()) / len(body)
        nearest = max(nearest, (equal, f"it comes nearest to {arch}, but {_difference(shapes, body, (weight, bias))}"))
    if nearest[1]:
        raise InputError(nearest[1] + OF_TIMM * (named is None and "has no place for" in nearest[1]))
    names = ", ".join(list(shapes)[:3])
    raise InputError(
        f"its tensors ({names} ...) are those of none of the known architectures ({', '.join(ARCHITECTURES)}) by "
        "torchvision's names"
        # No width or number of groups makes up for another stem.
        + (
            "; Detectron2's ResNet has no such architecture either"
            if is_resnet and "conv1.weight" not in shapes
            else ""
        )
        + OF_TIMM
    )


def _difference(shapes: dict[str, tuple[int, ...]], body: dict[str, tuple[int, ...]], head: tuple[str, str]) -> str:
    found = {
        "lacks": [name for name in body if name not in shapes],
        "has no place for": [name for name in shapes if name not in body and name not in head],
        "differs in the shape of": [name for name, shape in body.items() if shapes.get(name, shape) != shape],
    }
    parts = [f"{what} {', '.join(names[:3])}" + " ..." * (len(names) > 3) for what, names in found.items() if names]
    return " and ".join(parts) or f"its classifier {head[0].removesuffix('.weight')} is not one linear layer"
