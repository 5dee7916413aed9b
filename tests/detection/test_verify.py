"""The proof: it passes for a right conversion, and fails for each wrong one that Detectron2 would accept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, write_backbone
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.detection.verify import TOLERANCE, StageError, feature_errors, prove
from robust_backbones.errors import InputError, ProofFailedError

Maker = Callable[[str], Path]
STAGES = ["res2", "res3", "res4", "res5"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG whose sides are no multiples of 32, and which is to be shown turned by a quarter."""
    pixels = torch.randint(0, 256, (30, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy()).resize((100, 130))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def largest(errors: list[StageError], **of: str) -> float:
    return max(e.relative for e in errors if all(getattr(e, name) == value for name, value in of.items()))


@pytest.mark.parametrize(
    "arch", ["resnet18", pytest.param("wide_resnet50_2", marks=pytest.mark.slow), "resnext50_32x4d"]
)
def test_features_are_equal(torchvision_file: Maker, converted: Maker, arch: str) -> None:
    errors = feature_errors(read_checkpoint(torchvision_file(arch)), converted(arch), size=64)
    assert [(e.batch_norm, e.stage) for e in errors] == [
        (mode, stage) for mode in ("eval", "train") for stage in STAGES
    ]
    assert largest(errors, batch_norm="eval") < 1e-5
    assert largest(errors, batch_norm="train") < 1e-9  # in float64


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_every_format_is_proven_on_a_photograph_too(
    torchvision_file: Maker, tmp_path: Path, photo: Path, suffix: str
) -> None:
    checkpoint, path = read_checkpoint(torchvision_file("resnet18")), tmp_path / f"backbone{suffix}"
    write_backbone(path, convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
    errors = prove(checkpoint, path, image=photo)
    assert {e.image for e in errors} == {"random", "photo.jpg"}
    assert len(errors) == 16


@pytest.mark.slow
@pytest.mark.real_data
def test_features_are_equal_on_a_real_photograph(torchvision_file: Maker, converted: Maker, real_data: Path) -> None:
    photograph = min((real_data / "detectron2/VOC2007/JPEGImages").iterdir())
    errors = prove(read_checkpoint(torchvision_file("resnet18")), converted("resnet18"), image=photograph)
    assert {e.image for e in errors} == {"random", photograph.name}


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride_in_1x1": True},
        {"channel_order": "BGR"},
        {"std": (1 / 255, 1 / 255, 1 / 255)},
        {"mean": (0.406, 0.456, 0.485)},
    ],
)
def test_wrong_metadata_shows(torchvision_file: Maker, tmp_path: Path, photo: Path, wrong: dict[str, object]) -> None:
    """BGR here means: the detector flips the channels of weights that were trained on RGB."""
    checkpoint = read_checkpoint(torchvision_file("resnet50" if "stride_in_1x1" in wrong else "resnet18"))
    metadata = BackboneMetadata.of(checkpoint)
    path = tmp_path / "wrong.pkl"
    write_backbone(path, convert(checkpoint)[0], replace(metadata, spec=replace(metadata.spec, **wrong)))
    errors = feature_errors(checkpoint, path, image=photo, size=64)
    for image in ("random", "photo.jpg"):
        assert largest(errors, image=image, batch_norm="eval") > 100 * TOLERANCE


def swap(tensors: dict[str, Tensor]) -> None:
    a, b = "res3.0.conv2.weight", "res3.1.conv2.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def swap_norms(tensors: dict[str, Tensor]) -> None:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        a, b = f"res4.0.conv2.norm.{tensor}", f"res4.1.conv2.norm.{tensor}"
        tensors[a], tensors[b] = tensors[b], tensors[a]


def forget_statistics(tensors: dict[str, Tensor]) -> None:
    tensors["res2.0.conv1.norm.running_var"] = torch.ones(64)


@pytest.mark.parametrize("plant", [swap, swap_norms, forget_statistics])
def test_a_planted_mistake_that_every_shape_fits_shows(
    torchvision_file: Maker, tmp_path: Path, plant: Callable[[dict[str, Tensor]], None]
) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    plant(tensors)
    write_backbone(tmp_path / "planted.pkl", tensors, BackboneMetadata.of(checkpoint))
    assert largest(feature_errors(checkpoint, tmp_path / "planted.pkl", size=64), batch_norm="eval") > 100 * TOLERANCE


@pytest.mark.parametrize("plant", ["missing", "shape"])
def test_a_planted_mistake_that_a_shape_tells_is_refused_by_the_guard(
    torchvision_file: Maker, tmp_path: Path, plant: str
) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    tensor = tensors.pop("res4.1.conv2.weight")
    if plant == "shape":
        tensors["res4.1.conv2.weight"] = tensor[:, :, :1, :1]
    write_backbone(tmp_path / "planted.pkl", tensors, BackboneMetadata.of(checkpoint))
    with pytest.raises(InputError, match=r"fills 99 of the backbone's 100 tensors .*res4\.1\.conv2\.weight"):
        prove(checkpoint, tmp_path / "planted.pkl")


def test_the_stage_of_one_altered_tensor_shows(torchvision_file: Maker, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    tensors["res4.1.conv2.norm.bias"] = tensors["res4.1.conv2.norm.bias"] + 0.05
    path = tmp_path / "altered.pkl"
    write_backbone(path, tensors, BackboneMetadata.of(checkpoint))
    errors = feature_errors(checkpoint, path, size=64)
    assert max(largest(errors, stage=stage) for stage in ("res2", "res3")) < TOLERANCE
    assert min(largest(errors, stage=stage) for stage in ("res4", "res5")) > TOLERANCE


def test_features_that_are_zero_throughout_prove_nothing(torchvision_file: Maker, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    dead = replace(checkpoint, state_dict={name: torch.zeros_like(t) for name, t in checkpoint.state_dict.items()})
    write_backbone(tmp_path / "backbone.pkl", convert(dead)[0], BackboneMetadata.of(dead))
    with pytest.raises(ProofFailedError, match="res2 by nan"):
        prove(dead, tmp_path / "backbone.pkl")


@pytest.mark.parametrize("content", [b"noise", None])
def test_what_is_no_image_is_refused(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Maker, tmp_path: Path, content: bytes | None
) -> None:
    image, target = tmp_path / "image.jpg", tmp_path / "out.pkl"
    if content is None:
        Image.new("RGB", (40, 400)).save(image)
    else:
        image.write_bytes(content)
    status, _, err = run_tool("convert", torchvision_file("resnet18"), target, "--image", image)
    assert status == 2
    assert err.count("\n") == 1
    assert "image" in err
    assert err.count(str(image)) == (content is not None)
    assert not target.exists()


def test_the_tool_proves_and_says_where(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Maker, tmp_path: Path
) -> None:
    target = tmp_path / "backbone.pkl"
    status, out, _ = run_tool("convert", torchvision_file("resnet18"), target)
    assert status == 0
    assert "features are equal" in out
    assert str(target) in out.splitlines()[-1]
