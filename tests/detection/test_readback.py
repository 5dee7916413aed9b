"""A converted network of timm, and a detector that was trained on one, give the network back without its classifier."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from detectron2.modeling import build_model
from torch import nn
from torchvision import models

from robust_backbones.checkpoint.convert import SUFFIXES, convert_file
from robust_backbones.checkpoint.hub import describe, write_timm
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config
from robust_backbones.detection.verify import TOLERANCE, feature_errors, prove
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec
from robust_backbones.transfer.networks import feature_extractor
from tests.detection.conftest import SHAPES_CONFIG, SMALL, flat_overrides
from tests.detection.test_timm_backbone import checkpoint_of

ARCHITECTURES = (
    *("test_efficientnet", "test_convnext", "test_vit"),
    pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
)


def features(checkpoint: Any) -> torch.Tensor:
    """What a classifier would see, of a random image."""
    size = checkpoint.spec.image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = feature_extractor(checkpoint)(images)
    return found


@pytest.mark.parametrize(
    ("arch", "suffix"),
    [
        *zip(("test_efficientnet", "test_convnext", "test_vit"), SUFFIXES, strict=True),
        pytest.param("swin_tiny_patch4_window7_224", SUFFIXES[0], marks=pytest.mark.slow),
    ],
)
def test_a_converted_file_gives_the_network_back(arch: str, suffix: str, tmp_path: Path) -> None:
    """All but the classifier: also what no detector has a place for, as a last norm or convolution."""
    source, path = checkpoint_of(arch, tmp_path), tmp_path / f"backbone{suffix}"
    convert_file(source, path).check()
    back = read_checkpoint(path)
    assert (back.spec.arch, back.spec.num_classes, back.spec.mean) == (arch, 0, source.spec.mean)
    assert torch.equal(features(back), features(source))
    again = tmp_path / f"again{suffix}"
    convert_file(back, again).check()
    assert torch.equal(features(read_checkpoint(again)), features(source))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_detector_gives_its_trained_stages(arch: str, tmp_path: Path) -> None:
    source, path = checkpoint_of(arch, tmp_path), tmp_path / "backbone.pkl"
    convert_file(source, path).check()
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *flat_overrides(source.spec), "MODEL.DEVICE", "cpu"])
    detector = build_model(cfg)
    checkpointer = BackboneCheckpointer(detector, str(tmp_path), cfg=cfg)
    checkpointer.load(str(path))
    checkpointer.save("same", model=detector)
    same = read_checkpoint(tmp_path / "same.pth")
    assert torch.equal(features(same), features(source))
    for parameter in detector.parameters():
        parameter.data.mul_(1.01)
    checkpointer.save("model_final")
    trained = read_checkpoint(tmp_path / "model_final.pth")
    assert trained.spec == same.spec
    moved = [name for name, tensor in trained.state_dict.items() if not torch.equal(tensor, source.state_dict[name])]
    assert moved
    assert not any(name.startswith(("head.", "conv_head", "bn2", "norm.", "cls_token")) for name in moved)
    torch.testing.assert_close(trained.state_dict[moved[0]], source.state_dict[moved[0]] * 1.01)
    # A detector is resumed from what it saved, and keeps the rest.
    resumed = BackboneCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg)
    resumed.load(str(tmp_path / "model_final.pth"))
    resumed.save("later")
    later = read_checkpoint(tmp_path / "later.pth")
    assert torch.equal(features(later), features(trained))


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["torchvision", "transformers"])
def test_a_convnext_is_proven_against_its_makers_own_network(maker: str, tmp_path: Path) -> None:
    """In both modes; and where a scale of the file's is another than that of what was written, the proof fails."""
    if maker == "torchvision":
        network: Any = models.convnext_tiny(num_classes=3)
        path = tmp_path / "source.pth"
    else:
        network = transformers.ConvNextForImageClassification(transformers.ConvNextConfig())
        path = tmp_path / "model.safetensors"
    for name, parameter in network.named_parameters():
        if "layer_scale" in name:
            nn.init.constant_(parameter, 0.5)
    if maker == "torchvision":
        torch.save(network.state_dict(), path)
    else:
        network.save_pretrained(tmp_path)
    statement = Statement(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    checkpoint = read_checkpoint(path, statement=statement if maker == "transformers" else None)
    convert_file(checkpoint, tmp_path / "backbone.pkl").check()
    errors = feature_errors(checkpoint, tmp_path / "backbone.pkl", size=64)
    assert {error.against.split("'")[0] for error in errors} == {maker}
    assert max(error.relative for error in errors) < 1e-5
    checkpoint.state_dict["stages.3.blocks.2.gamma"].mul_(2)
    convert_file(checkpoint, tmp_path / "wrong.pkl").check()
    wrong = feature_errors(checkpoint, tmp_path / "wrong.pkl", size=64)
    assert {error.stage for error in wrong if error.relative > TOLERANCE} == {"res5"}


@pytest.mark.slow
def test_a_vit_of_transformers_keeps_its_epsilon_in_a_detector(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    statement = Statement(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors", statement=statement)
    assert checkpoint.spec.detectron2_overrides()["MODEL.VIT.NORM_EPSILON"] == 1e-12
    convert_file(checkpoint, tmp_path / "backbone.pkl", prove=prove).check()
    back = read_checkpoint(tmp_path / "backbone.pkl")
    assert back.spec.norm_epsilon == 1e-12
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *flat_overrides(back.spec), "MODEL.DEVICE", "cpu"])
    assert {m.eps for m in build_model(cfg).backbone.net.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


def test_without_the_rest_there_is_no_network(tmp_path: Path) -> None:
    """A last norm of random or of no weights would be another network."""
    source, path = checkpoint_of("test_convnext", tmp_path), tmp_path / "backbone.pth"
    convert_file(source, path).check()
    content = torch.load(path)
    del content["rest"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"lacks head\.norm"):
        read_checkpoint(path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_timm_loads_what_is_written_for_it(arch: str, tmp_path: Path) -> None:
    source = checkpoint_of(arch, tmp_path)
    folder = tmp_path / "hub"
    folder.mkdir()
    write_timm(folder / "model.safetensors", source)
    describe(folder, source)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = source.spec.image_size
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network(images), source.build()(images))
    data = timm.data.resolve_data_config({}, model=network)
    assert (tuple(data["mean"]), data["interpolation"]) == (source.spec.mean, source.spec.interpolation)
    assert int(size / data["crop_pct"]) == source.spec.val_resize
    back = read_checkpoint(folder / "model.safetensors")
    assert (back.spec, back.threat_model) == (source.spec, source.threat_model)
    assert isinstance(back.build(), nn.Module)


@pytest.mark.slow
def test_train_takes_a_published_convnext_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file that its makers' code would have left there; converted and proven at the first use."""
    monkeypatch.setenv("ROBUST_BACKBONES_CACHE", str(tmp_path))
    name = "Debenedetti2022Light_ConvNeXt-T"
    network = timm.create_model("convnext_tiny")
    for key, parameter in network.named_parameters():
        if key.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    (tmp_path / "published").mkdir()
    torch.save(network.state_dict(), tmp_path / "published" / f"{name}.pt")
    spec = BackboneSpec("convnext_tiny", 1000, (0.0,) * 3, (1.0,) * 3)
    weights = ["MODEL.WEIGHTS", f"robust://{name}", "MODEL.DEVICE", "cpu"]
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *flat_overrides(spec), *weights])
    detector = build_model(cfg)
    checkpointer = BackboneCheckpointer(detector, cfg=cfg)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert checkpointer.metadata is not None
    assert checkpointer.metadata.threat_model == "Linf:4/255"
    loaded = detector.backbone.bottom_up.network.state_dict()
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in loaded.items())
