"""What a file's tensors say about the normalisation of images before the network."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from robust_backbones.checkpoint.layouts import Network, tensors_of
from robust_backbones.errors import InputError
from robust_backbones.models import is_triple

_STD_OF = {"new_mean": "new_std", "mean": "std", "mu": "sigma", "pixel_mean": "pixel_std"}
"""Libraries' names of the mean -> of the std beside it."""


def normalizer_of(network: Network, content: dict[str, Any]) -> dict[str, Any] | None:
    """Mean and std of a layer that normalises the input, or of the file's own entries; those closest to the network.

    Raises:
        InputError: there are several that differ, or one in front of the other.
    """
    entries = {k: v for k, v in content.items() if k in _STD_OF or k in _STD_OF.values()}
    values = {name: torch.tensor(v) for name, v in entries.items() if is_triple(v)} | tensors_of(entries)
    values |= network.tensors
    found: dict[int, list[dict[str, Any]]] = {}  # how many levels of names it shares with the network -> normalisers
    before: dict[int, str] = {}  # how many levels above the network -> a normaliser there
    for name in values:
        *layers, last = name.split(".")
        if last not in _STD_OF or "attacker" in layers:
            continue
        pair = (name, ".".join([*layers, _STD_OF[last]]))
        numbers = [_triple(values.get(one), of_all=True) for one in pair]
        # Detectron2's are in units of 0-255, in which 0 and 1 leave pixels as they are; numbers that could be in either
        # are nobody's word (``check_normalizers``).
        of_255 = last == "pixel_mean"
        if not all(numbers) or (of_255 and max(map(max, numbers)) <= 1):
            continue
        mean, std = (tuple(round(value / (255 if of_255 else 1), 6) for value in three) for three in numbers)
        shared = network.shared_levels(layers)
        found.setdefault(shared, []).append({"mean": mean, "std": std})
        if shared == len(layers) - 1:
            before[shared] = ".".join(layers)
    if len(before) > 1:
        raise InputError(f"it normalises its input by {' and by '.join(before.values())}: save it with one of them")
    first, *others = found[max(found)] if found else [None]
    if any(other != first for other in others):
        raise InputError(f"it normalises its input in {1 + len(others)} ways that differ: save one network alone")
    return first


def check_normalizers(network: Network) -> None:
    """Refuse to assume a mean if the file may have one under a name that ``normalizer_of`` does not know."""
    for name, tensor in network.tensors.items():
        of_channels = (tensor.numel() == 3 and tensor.ndim > 2) or re.search(
            "mean|std|sigma|scale|shift", name.split(".")[-1]
        )
        if of_channels and name not in network.names and "attacker" not in name and (numbers := _triple(tensor)):
            values = " ".join(f"{value:.6g}" for value in numbers)
            raise InputError(f"it holds {name} ({values}), which may normalise its input: give --mean and --std")


def _triple(tensor: Tensor | None, *, of_all: bool = False) -> list[float]:
    """The three numbers of a tensor, (3, 1, 1) and the like; three times that of (1, 1, 1), for all channels; or none.

    ``of_all``: whether any single number is for all channels.
    """
    if tensor is None or tensor.is_complex():
        return []
    if tensor.numel() == 3 or (tensor.numel() == 1 and (of_all or tensor.ndim > 2)):
        return tensor.double().flatten().tolist() * (3 // tensor.numel())
    return []
