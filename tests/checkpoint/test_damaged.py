"""Valid files whose contents are damaged: refused in a sentence, or read to the same tensors; never a traceback."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust_backbones.checkpoint import sources
from robust_backbones.checkpoint.convert import BackboneMetadata, convert, metadata_in
from robust_backbones.checkpoint.format import FORMAT
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone

MUTATIONS = 600
STATED = Statement(channel_order="RGB", stride_in_1x1=False)
# What a file could hold where something else belongs.
MEAN, STD = [0.4, 0.4, 0.4], [0.2, 0.2, 0.2]
NUMBERS = [0, -1, 1e400, float("nan"), 10**400, 1j, True, False]
CONTAINERS = [[], [1], {}, {"a": 1}, {1: 2}, (1, 2, 3), ["a", "b", "c"], [True] * 3, [10**400] * 3, [torch.ones(1)] * 3]
TENSORS = [
    *(torch.ones(3), torch.ones(()), torch.ones(0), torch.ones(2, 2, dtype=torch.bool)),
    *(torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.int8)),
]
VALUES = [*NUMBERS, *CONTAINERS, *TENSORS, "x", "", None, b"x", object()]
KEYS = ["x", "", 1, ("a",), "mean", "std", "said", "format", "spec", "metadata", "backbone_metadata", "__metadata__"]


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def contents(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What files of five kinds hold, ours among them."""
    spec = BackboneSpec("resnet18", 3)
    tensors = build_backbone(spec).state_dict()
    ours = {"format": FORMAT, "spec": spec.to_dict(), "threat_model": "L2:3", "state_dict": tensors}
    monkeypatch.setattr(sources, "load_tensors", lambda _: ours)
    checkpoint = read_checkpoint(path)
    metadata = BackboneMetadata.of(checkpoint).to_dict()
    described = {"mean": MEAN, "std": STD, "architecture": "resnet18"}
    normalizer = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}
    return [
        ours,
        {"model": convert(checkpoint)[0], "metadata": metadata, "matching_heuristics": True},
        {"__metadata__": {"robust_backbones": json.dumps(metadata)}, **tensors},
        {"state_dict": under("module.", tensors), "pretrained_cfg": described, "mean": MEAN, "std": STD},
        {"pytorch-lightning_version": "2", "state_dict": normalizer | under("model.", tensors), "hyper_parameters": {}},
    ]


def mutated(value: Any, choose: random.Random, *, top: bool = False) -> Any:
    """A copy in which one value, at any depth, is another, is gone or is new."""
    if isinstance(value, dict) and value and (top or choose.random() < 0.85):
        value, key, kind = dict(value), choose.choice(list(value)), choose.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25:
            value[choose.choice(KEYS)] = choose.choice(VALUES)
        else:
            value[key] = mutated(value[key], choose)
        return value
    if isinstance(value, list) and value and choose.random() < 0.5:
        place = choose.randrange(len(value))
        return [*value[:place], choose.choice(VALUES), *value[place + 1 :]]
    if isinstance(value, str) and value.startswith("{") and choose.random() < 0.7:
        return json.dumps(mutated(json.loads(value), choose), default=repr)
    return choose.choice(VALUES)


def test_damaged_contents_are_refused_or_read_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(b"its sha256 alone is asked for")
    whole = contents(path, monkeypatch)
    seen: Counter[str] = Counter()
    unnamed = {}
    for seed in range(MUTATIONS):
        choose = random.Random(seed)
        content = mutated(choose.choice(whole), choose, top=True)
        monkeypatch.setattr(sources, "load_tensors", lambda _, content=content: content)
        try:
            metadata_in(content)  # as a detector's checkpoint is read
            arch = read_checkpoint(path, statement=choose.choice([STATED, None])).spec.arch
            seen[arch] += 1
        except InputError as error:
            seen["refused"] += 1
            if "Error(" in str(error):  # an exception's own words in place of what is wrong
                unnamed[seed] = str(error)
    assert not unnamed
    assert seen.keys() == {"resnet18", "refused"}
    assert min(seen.values()) > MUTATIONS / 10
