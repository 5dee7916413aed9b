"""The proof: it passes for a right conversion, and fails for each wrong one that Detectron2 would accept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from robust_backbones.convert import BackboneMetadata, convert, write_backbone
from robust_backbones.detection.verify import TOLERANCE, feature_errors
from robust_backbones.sources import read_checkpoint

Maker = Callable[[str], Path]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_features_are_equal(torchvision_file: Maker, converted: Maker, arch: str) -> None:
    errors = feature_errors(read_checkpoint(torchvision_file(arch)), converted(arch), size=64)
    assert list(errors) == ["res2", "res3", "res4", "res5"]
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride_in_1x1": True},
        {"channel_order": "BGR"},
        {"std": (1 / 255, 1 / 255, 1 / 255)},
        {"mean": (0.406, 0.456, 0.485)},
    ],
)
def test_wrong_metadata_shows(torchvision_file: Maker, tmp_path: Path, wrong: dict[str, object]) -> None:
    """BGR here means: the detector flips the channels of weights that were trained on RGB."""
    checkpoint = read_checkpoint(torchvision_file("resnet50"))
    metadata = BackboneMetadata.of(checkpoint)
    path = tmp_path / "wrong.pkl"
    write_backbone(path, convert(checkpoint)[0], replace(metadata, spec=replace(metadata.spec, **wrong)))
    assert max(feature_errors(checkpoint, path, size=64).values()) > 100 * TOLERANCE


def test_one_altered_tensor_shows(torchvision_file: Maker, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    tensors["res4.1.conv2.norm.bias"] = tensors["res4.1.conv2.norm.bias"] + 0.05
    path = tmp_path / "altered.pkl"
    write_backbone(path, tensors, BackboneMetadata.of(checkpoint))
    errors = feature_errors(checkpoint, path, size=64)
    assert max(errors["res2"], errors["res3"]) < TOLERANCE
    assert min(errors["res4"], errors["res5"]) > TOLERANCE


def test_the_tool_proves_and_says_where(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Maker, tmp_path: Path
) -> None:
    target = tmp_path / "backbone.pkl"
    status, out, _ = run_tool("convert_backbone", torchvision_file("resnet18"), target, "--verify")
    assert status == 0
    assert "features are equal" in out
    assert str(target) in out.splitlines()[-1]
