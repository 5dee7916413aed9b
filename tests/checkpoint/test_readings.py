"""What a file does not show is said by somebody, and what is wrong in it is refused by name: nothing is guessed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from robust_backbones.checkpoint import sources
from robust_backbones.checkpoint.convert import BackboneMetadata, convert, convert_file, read_backbone
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, reference_shapes

STATED = Statement(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order="BGR", stride_in_1x1=False)


def network(arch: str = "resnet18", first: float = 1.0) -> dict[str, Tensor]:
    """The tensors of an architecture, each full of a number of its own, in half precision to be small."""
    shapes, _ = reference_shapes(arch, "imagenet")
    return {name: torch.full(shape, first + number).half() for number, (name, shape) in enumerate(shapes.items())}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


@pytest.mark.parametrize(
    "make",
    [
        lambda one, two: ({"state_dict": one, "model": two}, {"key": "state_dict"}, {"key": "model"}),
        lambda one, two: ({"net": one, "network": two}, {"key": "net"}, {"key": "network"}),
        lambda one, two: ({"a": {"b": one}, "c": two}, {"key": "a.b"}, {"key": "c"}),
        lambda one, two: (
            {"state_dict": under("model.", one) | under("ema_model.", two)},
            {"prefix": "model."},
            {"prefix": "ema_model"},
        ),
    ],
    ids=["state_dict and model", "net and network", "nested", "model and ema_model"],
)
def test_of_several_networks_one_is_chosen(tmp_path: Path, make: Callable[..., Any]) -> None:
    one, two = network(), network(first=500.0)
    content, *choices = make(one, two)
    path = saved(tmp_path, content)
    with pytest.raises(InputError, match="2 networks that differ") as refused:
        read_checkpoint(path, statement=STATED)
    for choice, expected in zip(choices, (one, two), strict=True):
        ((option, value),) = choice.items()
        assert f"--{option} {value}" in str(refused.value)
        found = read_checkpoint(path, statement=STATED, **choice).state_dict
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with pytest.raises(InputError, match="holds no network at --key 'neither'"):
        read_checkpoint(path, statement=STATED, key="neither")


CFG = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ({"architecture": "resnet50"}, True),
        ({"architecture": "tv_resnet50.tv_in1k"}, True),
        ({"architecture": "resnet50.a1_in1k"}, True),
        ({"architecture": "resnetaa50"}, False),
        ({"architecture": "resnetblur50.bt_in1k"}, False),
        ({"architecture": "resnet50", "model_args": {"output_stride": 16}}, False),
        ({"architecture": "resnet50", "model_args": {"act_layer": "silu"}}, False),
        ({"architecture": "resnet50", "model_args": {"num_classes": 7}}, True),
    ],
)
def test_variants_without_tensors_of_their_own_are_refused(tmp_path: Path, said: dict[str, Any], right: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**said, "pretrained_cfg": CFG}))
    safetensors.torch.save_file(network("resnet50"), path := tmp_path / "model.safetensors")
    if right:
        assert read_checkpoint(path).spec.arch == "resnet50"
    else:
        with pytest.raises(InputError, match="other features"):
            read_checkpoint(path)


def test_who_says_each_value_is_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, network("resnet50"))
    assert set(read_checkpoint(path).said.values()) == {"assumed"}
    with pytest.raises(InputError, match="neither it nor you") as refused:
        read_checkpoint(path, require_said=True)
    assert "--channel-order RGB --stride-in-1x1 false, if" in str(refused.value)
    half = replace(STATED, channel_order=None, stride_in_1x1=None)
    expected = {"mean": "said by you", "std": "said by you", "channel_order": "assumed", "stride_in_1x1": "assumed"}
    checkpoint = read_checkpoint(path, statement=half)
    assert checkpoint.said == expected
    convert_file(checkpoint, converted := tmp_path / "converted.pkl").check()
    _, metadata = read_backbone(converted)
    assert metadata.said == expected
    assert metadata.reading().count("(assumed)") + metadata.reading().count("(said by you)") >= 2
    assert read_checkpoint(converted).said["channel_order"] == "assumed"  # by conversion nothing is known better
    with pytest.raises(InputError, match="neither it nor you"):
        read_checkpoint(converted, require_said=True)
    assert set(read_checkpoint(path, statement=STATED, require_said=True).said.values()) == {"said by you"}


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"bn1.running_var": torch.full((64,), -0.5)}, "bn1.running_var holds a variance of -0.5"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, "conv1.weight holds int8"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.bool)}, "conv1.weight holds bool"),
        ({"normalize.mean": torch.tensor([123.7, 116.3, 103.5]), "normalize.std": torch.full((3,), 58.0)}, "by 255"),
        ({"normalize.mean": torch.full((3,), 0.5), "normalize.std": torch.zeros(3)}, "std 0 0 0"),
    ],
)
def test_values_that_no_network_has_are_refused(tmp_path: Path, change: dict[str, Tensor], refusal: str) -> None:
    with pytest.raises(InputError, match=refusal):
        read_checkpoint(saved(tmp_path, network() | change))


# Damage inside valid files.


def contents(folder: Path) -> Iterator[dict[str, Any]]:
    tensors, numbers = network(), {"epoch": 3, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}
    spec = BackboneSpec("resnet18", 1000).to_dict()
    yield {"format": "robust_backbones.checkpoint/1", "spec": spec, "threat_model": "L2:3", "state_dict": tensors}
    twice = under("module.model.", tensors) | under("module.attacker.model.", tensors)
    normalizer = {f"module.normalizer.new_{name}": torch.full((3, 1, 1), 0.5) for name in ("mean", "std")}
    yield {"model": twice | normalizer, **numbers}
    yield {"state_dict": tensors, "arch": "resnet18", "pretrained_cfg": CFG | {"architecture": "resnet18"}, **numbers}
    hyper = {"arch": "resnet18", "lr": 0.1}
    yield {"state_dict": under("model.", tensors), "pytorch-lightning_version": "2", "hyper_parameters": hyper}
    yield {"mu": [0.5, 0.5, 0.5], "sigma": torch.full((3,), 0.25), "state_dict": tensors}
    convert_file(read_checkpoint(saved(folder, tensors)), folder / "converted.pth").check()
    yield torch.load(folder / "converted.pth", weights_only=True)


WRONG: list[Any] = [
    *(
        "text",
        "",
        True,
        None,
        3,
        -1,
        10**400,
        float("nan"),
        float("inf"),
        [],
        [1],
        {},
        {"a": {"b": 1}},
        (1, 2),
        b"bytes",
    ),
    *(torch.zeros(()), torch.zeros(0), torch.ones(2, 2, dtype=torch.complex64), torch.full((3,), float("nan"))),
    *(torch.ones(3, dtype=torch.bool), torch.ones(1000, dtype=torch.int64), [0.1, "0.2", 0.3], [0.1, None, True]),
]


def damaged(content: dict[str, Any], draw: random.Random) -> str:
    """Damage one place of ``content``; the name of the tensor there, if it is one."""
    node: Any = content
    while True:
        key = draw.choice([*node])
        inner = [name for name, value in node.items() if isinstance(value, dict) and value]
        if inner and draw.random() < 0.7:
            node = node[draw.choice(inner)]
            continue
        kind = draw.choice(["replace", "replace", "replace", "delete", "rename", "add"])
        name = key if isinstance(node[key], Tensor) else ""
        if kind == "replace":
            node[key] = copy.deepcopy(draw.choice(WRONG))
        elif kind == "delete":
            del node[key]
        elif kind == "rename":
            node[draw.choice([7, None, (1, "a"), f"{key}.x", "conv1.weight", "arch", "mean"])] = node.pop(key)
        else:
            node[draw.choice(["arch", "mean", "std", "mu", "pretrained_cfg", "spec", 1.5, "model"])] = draw.choice(
                WRONG
            )
        return str(name)


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.slow)], ids=str)
def test_damage_is_refused_or_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    """Contents, as the reader of untrusted files gives them, so that none has to be written."""
    expected, whole = network(), [*contents(tmp_path)]
    path, read = saved(tmp_path, {}), 0
    for seed in seeds:
        draw = random.Random(seed)
        content = copied(draw.choice(whole))
        name = damaged(content, draw)
        monkeypatch.setattr(sources, "load_tensors", lambda path, content=content: content)
        try:
            checkpoint = read_checkpoint(path, statement=STATED if draw.random() < 0.5 else None)
            json.dumps(BackboneMetadata.of(checkpoint).to_dict())
            converted, report = convert(checkpoint)
        except InputError as error:
            refusal = str(error)
            assert len(refusal.splitlines()) == 1, seed
            assert "it is damaged (" not in refusal, (seed, refusal)  # a guess, where the place could be named
            continue
        read += 1
        assert checkpoint.spec.arch == "resnet18", seed
        wrong = [
            short
            for short, tensor in checkpoint.state_dict.items()
            if short in expected and not torch.equal(tensor, expected[short].to(tensor.dtype))
        ]
        assert not wrong or name.endswith(wrong[0]), seed
        assert not report.ok or len(converted) == 100, seed
    assert read > len(seeds) // 5


def copied(content: Any) -> Any:
    """Its dictionaries are new, its tensors the same."""
    return {name: copied(value) for name, value in content.items()} if isinstance(content, dict) else content
