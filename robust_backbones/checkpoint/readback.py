"""Restores the timm network from a file that was converted from it, or from a detector that was trained from one."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from robust_backbones.checkpoint.convert import REST, apart, detectron2_names
from robust_backbones.checkpoint.layouts import Network
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec

# Detectron2's Swin has a norm after each stage, on the way to the pyramid, and keeps an index in its files; its ViT can
# have relative positions.
_OF_DETECTORS = r"norm\d\.|layers\..*\.relative_position_index$|blocks\..*\.rel_pos_[hw]$"


def network_of(content: dict[str, Any], spec: BackboneSpec) -> Network:
    """The network, by timm's names: its stages from the file, trained or not, and the rest as converted.

    Args:
        content: of a file whose metadata has this spec.

    Raises:
        InputError: it does not have all stages.
    """
    tensors, rest = ({n: t for n, t in held.items() if isinstance(t, Tensor)} for held in apart(content))
    own = {new: name for name, new in detectron2_names(spec).items()}
    anchor = next(iter(own))
    prefixes = [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in tensors for name in own), default=None)
    if prefix is None:
        raise InputError(f"it holds no {spec.arch}, which its metadata names: {anchor} is missing")
    inside = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if learnt := [name for name in inside if re.search(r"\.rel_pos_[hw]$", name) and tensors[name].any()]:
        raise InputError(
            f"its {len(learnt)} relative position embeddings ({learnt[0]} ...) are learnt, and timm's {spec.arch} has "
            "none: without them it computes other features (train the detector with MODEL.VIT.REL_POS False)"
        )
    names = {name: own.get(short, short) for name, short in inside.items() if not re.match(_OF_DETECTORS, short)}
    beside = {f"{REST}.{name}": tensor for name, tensor in rest.items()}
    names |= {name: name.removeprefix(f"{REST}.") for name in beside}
    return Network("", prefix, names, tensors | beside, spec, "detectron2")
