"""The published ConvNeXts, Swins, ViTs and XCiTs: their table, and their files, which others download."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.checkpoint.zoo import cache_folder, fetch, find, published, published_robust, robust_table
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone, usual_spec
from robust_backbones.threat_models import ThreatModel

AS_IT_IS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "clean", "robust"),
    # from RobustBench's leaderboard and the authors' READMEs
    [
        ("Singh2023Revisiting_ConvNeXt-L-ConvStem", 77.00, 57.70),
        ("Singh2023Revisiting_ViT-S-ConvStem", 72.56, 48.08),
        ("Liu2023Comprehensive_Swin-L", 78.10, 57.06),
        ("Debenedetti2022Light_XCiT-S12", 72.34, 41.78),
        ("ARES_ViT_base_patch16_224_AT", 74.7, 49.7),
    ],
)
def test_accuracies_are_those_that_are_reported(name: str, clean: float, robust: float) -> None:
    assert (find(name).imagenet_accuracy, find(name).robust_accuracy) == (clean, robust)


def test_every_row_says_where_it_comes_from_and_can_be_built() -> None:
    assert not published_robust().keys() & published().keys()
    for one in published_robust().values():
        assert usual_spec(one.arch).arch == one.arch
        assert one.source
        assert one.where
        assert one.threat_model == ThreatModel("Linf", 4 / 255)
        assert one.robust_accuracy is not None
        assert one.robust_accuracy < one.imagenet_accuracy
    assert len({len(line) for line in robust_table().splitlines()}) == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUST_BACKBONES_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    folder = cache_folder() / "published"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (
            "Liu2023Comprehensive_Swin-B",
            r"robustbench\.utils\.load_model\('Liu2023.* models/imagenet/Linf/.*; copy it to",
        ),
        ("Debenedetti2022Light_XCiT-S12", r"by hand: save https://drive\.google\.com/.* as"),
        ("ARES_ViT_small_patch16_224_AT", r"cannot download https://ml\.cs\.tsinghua.* put it at"),
    ],
)
def test_a_file_that_is_not_there_says_how_to_get_it(name: str, how: str, cache: Path) -> None:
    with pytest.raises(InputError, match=how):
        fetch(name)


@pytest.mark.parametrize(
    ("name", "fed", "evaluated"),
    [
        pytest.param("Debenedetti2022Light_ConvNeXt-T", AS_IT_IS, (235, "bicubic"), marks=pytest.mark.slow),
        pytest.param("Debenedetti2022Light_XCiT-S12", AS_IT_IS, (224, "bicubic"), marks=pytest.mark.slow),
        pytest.param("Singh2023Revisiting_ConvNeXt-T-ConvStem", AS_IT_IS, (256, "bicubic"), marks=pytest.mark.slow),
        ("ARES_ViT_small_patch16_224_AT", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (256, "bicubic")),
    ],
)
def test_its_name_says_how_it_is_fed(name: str, fed: Any, evaluated: tuple[int, str], cache: Path) -> None:
    """A plain state dict, as its makers save it, says nothing of that."""
    arch = find(name).arch
    network = build_backbone(usual_spec(arch))
    file = find(name).file
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in network.state_dict().items()}}, cache / file)
    checkpoint = read_checkpoint(f"hub:{name}")
    spec = BackboneSpec(arch, 1000, *fed, val_resize=evaluated[0], interpolation=evaluated[1])
    assert (checkpoint.spec, checkpoint.threat_model) == (spec, ThreatModel("Linf", 4 / 255))
    for key, tensor in network.state_dict().items():
        assert torch.equal(checkpoint.state_dict[key], tensor)


def test_the_user_names_what_no_shape_tells(tmp_path: Path) -> None:
    network = timm.create_model("xcit_nano_12_p16_224", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "xcit.pth")
    said = Statement(mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match="none of the known architectures"):
        read_checkpoint(tmp_path / "xcit.pth", statement=said)
    stated = Statement(mean=(0.5,) * 3, std=(0.5,) * 3, arch="xcit_nano_12_p16_224")
    assert read_checkpoint(tmp_path / "xcit.pth", statement=stated).spec.arch == "xcit_nano_12_p16_224"
    with pytest.raises(InputError, match="give --mean"):
        read_checkpoint(tmp_path / "xcit.pth", statement=Statement(arch="xcit_nano_12_p16_224"))
    with pytest.raises(InputError, match="comes nearest to xcit_tiny"):
        read_checkpoint(tmp_path / "xcit.pth", statement=Statement(arch="xcit_tiny_12_p16_224"))
