"""Reading checkpoints: ours, torchvision's, and files that must neither run code nor show a traceback."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_backbones.checkpoint.format import sha256, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel


def test_our_own_round_trip(tmp_path: Path) -> None:
    spec = BackboneSpec("resnet18", 5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    backbone = build_backbone(spec)
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, spec=spec, state_dict=backbone.state_dict(), threat_model=ThreatModel("Linf", 4 / 255))
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec == spec
    assert checkpoint.threat_model == ThreatModel("Linf", 4 / 255)
    assert checkpoint.source_sha256 == sha256(path)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(checkpoint.build()(images), backbone.eval()(images))


@pytest.mark.parametrize(
    ("arch", "stem"),
    [
        ("resnet18", "cifar"),
        pytest.param("densenet161", "imagenet", marks=pytest.mark.slow),
        ("mnasnet1_0", "imagenet"),
        ("mobilenet_v2", "imagenet"),
        ("shufflenet_v2_x1_0", "imagenet"),
    ],
)
def test_our_own_round_trip_of_other_networks(tmp_path: Path, arch: str, stem: str) -> None:
    spec = BackboneSpec(arch, 5, stem=stem)
    backbone = build_backbone(spec, seed=1).eval()
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, spec=spec, state_dict=backbone.state_dict(), threat_model=ThreatModel("L2", 3))
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec == spec
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(checkpoint.build()(images), backbone(images))


def test_a_checkpoint_from_before_the_stem(tmp_path: Path) -> None:
    spec, path = BackboneSpec("resnet18", 5), tmp_path / "checkpoint.pt"
    state_dict = build_backbone(spec).state_dict()
    write_checkpoint(path, spec=spec, state_dict=state_dict, threat_model=ThreatModel())
    content = torch.load(path, weights_only=True)
    del content["spec"]["stem"]
    torch.save(content, path)
    assert read_checkpoint(path).spec == spec


@pytest.mark.parametrize("arch", ["wide_resnet50_2", "mobilenet_v2"])
def test_a_torchvision_file(torchvision_file: Callable[[str], Path], arch: str) -> None:
    checkpoint = read_checkpoint(torchvision_file(arch))
    assert checkpoint.spec == BackboneSpec(arch, 10)
    assert (checkpoint.layout, checkpoint.threat_model) == ("torchvision", None)


@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: pickle.dumps({"a": 1}) + tail))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_noise_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path, torchvision_file: Callable[[str], Path]) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes(torchvision_file("resnet18").read_bytes()[:-1000])
    with pytest.raises(InputError, match="is cut off"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "layout is not known"),
        ({"module.conv1.weight": torch.ones(1)}, "none of the known architectures"),
        ({"conv1.weight": torch.ones(1)}, "none of the known architectures"),
        ({"layer1.0.conv1.weight": torch.ones(())}, "none of the known architectures"),
        ({}, "layout is not known"),
        ({"format": "robust_backbones.checkpoint/1"}, "damaged"),
        ({"format": "robust_backbones.checkpoint/1", "spec": {"arch": "resnet9"}, "state_dict": {}}, "unknown arch"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "other",
    [BackboneSpec("resnet34", 5), BackboneSpec("resnet18", 6), BackboneSpec("resnet18", 5, stem="cifar")],
    ids=["architecture", "classes", "stem"],
)
def test_our_format_with_tensors_of_another_network_is_refused(tmp_path: Path, other: BackboneSpec) -> None:
    state_dict = build_backbone(other).state_dict()
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, spec=BackboneSpec("resnet18", 5), state_dict=state_dict, threat_model=ThreatModel())
    with pytest.raises(InputError, match="not those of resnet18 with 5 classes and the imagenet stem"):
        read_checkpoint(path)
