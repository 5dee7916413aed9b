"""Conversion: every tensor is accounted for, values are untouched, bytes are reproducible."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models import resnet50

from robust_backbones.checkpoint.convert import (
    SUFFIXES,
    BackboneMetadata,
    convert,
    convert_file,
    detectron2_name,
    read_backbone,
    write_backbone,
    write_torchvision,
)
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.names import translated
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, ResNetShape, build_backbone
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
    assert [translated(name, "detectron2", "torchvision") for name in converted] == names


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


def test_a_file_gets_its_name_once_it_is_proven(tmp_path: Path, torchvision_file: Callable[[str], Path]) -> None:
    checkpoint, path = read_checkpoint(torchvision_file("resnet18")), tmp_path / "backbone.pkl"
    path.write_bytes(b"the old one")

    def prove(proven: Checkpoint, unproven: Path) -> None:
        assert proven is checkpoint
        assert unproven != path
        assert read_backbone(unproven)[1] == BackboneMetadata.of(checkpoint)
        raise ProofFailedError("differs")

    with pytest.raises(ProofFailedError):
        convert_file(checkpoint, path, prove=prove)
    incomplete = replace(checkpoint, state_dict={"conv1.weight": checkpoint.state_dict["conv1.weight"]})
    assert not convert_file(incomplete, path).ok
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the old one"]
    assert convert_file(checkpoint, str(path)).ok
    assert read_backbone(str(path))[1] == BackboneMetadata.of(checkpoint)
    with pytest.raises(InputError, match=r"ends in \.pkl or \.pth or \.safetensors"):
        convert_file(checkpoint, tmp_path / "backbone.onnx")


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
    status, _, error = run_tool("convert", source, folder / "out.pkl")
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_file_from_before_the_stem(torchvision_file: Callable[[str], Path]) -> None:
    metadata = BackboneMetadata.of(read_checkpoint(torchvision_file("resnet18")))
    content = metadata.to_dict()
    del content["spec"]["stem"]
    assert BackboneMetadata.from_dict(content) == metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_says_what_it_holds(tmp_path: Path, torchvision_file: Callable[[str], Path], suffix: str) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    path = tmp_path / f"backbone{suffix}"
    write_backbone(path, convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
    tensors, metadata = read_backbone(path)
    assert metadata == BackboneMetadata.of(checkpoint)
    assert metadata.spec == BackboneSpec("resnet18", 10)
    assert tensors.keys() == convert(checkpoint)[0].keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in convert(checkpoint)[0].items())


@pytest.mark.slow
def test_identical_input_gives_identical_bytes(torchvision_file: Callable[[str], Path], tmp_path: Path) -> None:
    """In another process, which hashes and orders differently; and no file holds more than its tensors."""
    source = torchvision_file("resnet18")
    code = (
        "import sys, pathlib; from robust_backbones.checkpoint.convert import *\n"
        "from robust_backbones.checkpoint.sources import read_checkpoint\n"
        "checkpoint = read_checkpoint(pathlib.Path(sys.argv[1])); folder = pathlib.Path(sys.argv[2])\n"
        "for suffix in SUFFIXES: "
        "write_backbone(folder / f'x{suffix}', convert(checkpoint)[0], BackboneMetadata.of(checkpoint))\n"
        "for suffix in SUFFIXES[1:]: write_torchvision(folder / f'y{suffix}', checkpoint)\n"
    )
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "a"], check=True)
    checkpoint = read_checkpoint(source)
    for suffix in SUFFIXES:
        convert_file(checkpoint, tmp_path / f"b/x{suffix}").check()
    for suffix in SUFFIXES[1:]:
        write_torchvision(tmp_path / f"b/y{suffix}", checkpoint)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["x.pkl", "x.pth", "x.safetensors", "y.pth", "y.safetensors"]
    for name in files:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert len(content) < 1.02 * source.stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_back_to_torchvision(
    run_tool: Callable[..., tuple[int, str, str]],
    torchvision_file: Callable[[str], Path],
    tmp_path: Path,
    suffix: str,
) -> None:
    source, there, back = torchvision_file("resnet50"), tmp_path / f"there{suffix}", tmp_path / f"back{suffix}"
    assert run_tool("convert", source, there, "--no-verify")[0] == 0
    status, out, _ = run_tool("convert", there, back, "--to", "torchvision")
    assert status == 0
    assert "every tensor reads back equal" in out
    assert ("threat model, mean and std are lost" in out) == (suffix == ".pth")
    net = resnet50(num_classes=10)
    state_dict = safetensors.torch.load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    assert net.load_state_dict(state_dict, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    original = torch.load(source, weights_only=True)
    assert all(torch.equal(tensor, original[name]) for name, tensor in state_dict.items())


def test_what_a_torchvision_file_could_not_say_is_refused(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Callable[[str], Path], tmp_path: Path
) -> None:
    half = ("0.5", "0.5", "0.5")
    options = ("--to", "torchvision", "--mean", *half, "--std", *half)
    status, _, err = run_tool("convert", torchvision_file("resnet18"), tmp_path / "out.pth", *options)
    assert status == 2
    assert "write a .safetensors" in err
    assert run_tool("convert", torchvision_file("resnet18"), tmp_path / "out.safetensors", *options)[0] == 0
    assert read_checkpoint(tmp_path / "out.safetensors").spec.mean == (0.5, 0.5, 0.5)
    options = ("--to", "torchvision", "--stride-in-1x1", "true")
    status, _, err = run_tool("convert", torchvision_file("resnet50"), tmp_path / "out.pth", *options)
    assert status == 2
    assert "torchvision has no resnet50 with this stem and stride" in err


def test_json_is_all_there_is_on_stdout(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("detectron2")
    target = tmp_path / "backbone.pkl"
    status, out, err = run_tool("convert", torchvision_file("resnet18"), target, "--json")
    result = json.loads(out)
    assert status == 0
    assert result["output"] == str(target)
    assert str(target) in err.splitlines()[-1]
    assert result["report"]["ok"]
    assert len(result["report"]["renamed"]) == 100
    assert result["overrides"]["MODEL.RESNETS.DEPTH"] == 18
    said = next(line for line in err.splitlines() if line.startswith("Detectron2 needs "))
    pasted = iter(shlex.split(said.removeprefix("Detectron2 needs ")))
    assert dict(zip(pasted, pasted, strict=True)) == {key: str(held) for key, held in result["overrides"].items()}
    assert max(error["relative"] for error in result["errors"]) < 1e-4
    assert result["metadata"] == BackboneMetadata.of(read_checkpoint(torchvision_file("resnet18"))).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image", "photo.jpg", "--no-verify"), "leave out --no-verify"),
        (("--to", "torchvision", "--write-config", "x.yaml"), "leave out --to torchvision"),
        (("--write-config", "x.yaml", "--base-config", "none.yaml"), "no configuration at none.yaml"),
        (("--threat-model", "L7:3"), "L7"),
        (("--base-config", "quick/none.yaml"), "no configuration at quick/none.yaml"),
        (("--base-config", "quick/mask_rcnn_R_50_C4_shapes_instant.yaml"), "--write-config is based on"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    run_tool: Callable[..., tuple[int, str, str]],
    torchvision_file: Callable[[str], Path],
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    status, _, err = run_tool("convert", torchvision_file("resnet18"), tmp_path / "out.pth", *options)
    assert status == 2
    assert message in err
    assert not list(tmp_path.iterdir())


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
