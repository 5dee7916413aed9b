"""Conversion: every tensor is accounted for, values are untouched, bytes are reproducible."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_backbones.checkpoints import write_checkpoint
from robust_backbones.convert import (
    BackboneMetadata,
    convert,
    detectron2_name,
    read_backbone,
    torchvision_name,
    write_backbone,
)
from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, ResNetShape, build_backbone
from robust_backbones.sources import read_checkpoint
from robust_backbones.threat_models import ThreatModel


@pytest.mark.parametrize("arch", [arch for arch, shape in ARCHITECTURES.items() if isinstance(shape, ResNetShape)])
def test_every_tensor_gets_its_own_name(arch: str) -> None:
    with torch.device("meta"):
        state_dict = build_backbone(BackboneSpec(arch)).state_dict()
    names = [name for name in state_dict if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]
    converted = [detectron2_name(name) for name in names]
    assert len(set(converted)) == len(converted)
    # Each convolution has its weight and the four tensors of its norm.
    assert len(converted) == 5 * sum(tensor.ndim == 4 for tensor in state_dict.values())
    assert [torchvision_name(name) for name in converted] == names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
        ("layer3.22.bn3.bias", "res4.22.conv3.norm.bias"),
        ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("layer4.0.downsample.1.running_mean", "res5.0.shortcut.norm.running_mean"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert detectron2_name(name) == expected


def test_resnet50_has_265_tensors_and_their_values(torchvision_file: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet50"))
    tensors, report = convert(checkpoint)
    assert report.ok
    assert len(tensors) == len(report.renamed) == 265
    for name, new_name in report.renamed.items():
        np.testing.assert_array_equal(tensors[new_name], checkpoint.state_dict[name].numpy())


def test_what_does_not_fit_is_reported(torchvision_file: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    state_dict = dict(checkpoint.state_dict)
    del state_dict["layer1.0.bn1.weight"]
    state_dict["layer9.0.conv1.weight"] = torch.zeros(1)
    state_dict["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    _, report = convert(replace(checkpoint, state_dict=state_dict))
    assert not report.ok
    assert report.missing == ("layer1.0.bn1.weight",)
    assert report.unexpected == ("layer9.0.conv1.weight",)
    assert report.incorrect_shapes == ("conv1.weight",)
    assert "layer9.0.conv1.weight" in str(report)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BackboneSpec("mobilenet_v2", 5), "Detectron2's ResNet has no such architecture: mobilenet_v2"),
        (BackboneSpec("resnet18", 5, stem="cifar"), "Detectron2's ResNet has no cifar stem"),
    ],
    ids=["architecture", "stem"],
)
def test_what_detectron2_cannot_be_is_refused_before_anything_is_written(
    run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, spec: BackboneSpec, message: str
) -> None:
    source, folder = tmp_path / "checkpoint.pt", tmp_path / "converted"
    folder.mkdir()
    state_dict = build_backbone(spec).state_dict()
    write_checkpoint(source, spec=spec, state_dict=state_dict, threat_model=ThreatModel())
    status, _, error = run_tool("convert_backbone", source, folder / "out.pkl")
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_file_from_before_the_stem(torchvision_file: Callable[[str], Path]) -> None:
    metadata = BackboneMetadata.of(read_checkpoint(torchvision_file("resnet18")))
    content = metadata.to_dict()
    del content["spec"]["stem"]
    assert BackboneMetadata.from_dict(content) == metadata


def test_a_file_says_what_it_holds_and_is_reproducible(tmp_path: Path, torchvision_file: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    for name in ("a.pkl", "b.pkl"):
        write_backbone(tmp_path / name, convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    tensors, metadata = read_backbone(tmp_path / "a.pkl")
    assert metadata == BackboneMetadata.of(checkpoint)
    assert metadata.spec == BackboneSpec("resnet18", 10)
    assert set(tensors) == set(convert(checkpoint)[0])


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"format": "another"}, {"format": "robust_backbones.backbone/1"}, "text"],
)
def test_a_file_that_does_not_say_is_refused(tmp_path: Path, metadata: object) -> None:
    import pickle

    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps({"model": {}, "metadata": metadata}))
    with pytest.raises(InputError, match="convert it again"):
        read_backbone(path)
    path.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(InputError, match="does not say what backbone it holds"):
        read_backbone(path)
