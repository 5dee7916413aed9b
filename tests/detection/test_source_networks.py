"""The proof against the makers' own code: it passes where we read a file as they do, and fails where we do not."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, write_backbone
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.detection.source_networks import source_network
from robust_backbones.detection.unproven import differences
from robust_backbones.detection.verify import prove
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import BackboneSpec, build_backbone
from tests.checkpoint.test_families import of_transformers, save, shaken
from tests.conftest import randomize_batch_norms

Maker = Callable[[str], Path]


def timm_file(folder: Path, arch: str) -> Path:
    """A network of timm as it lies on the hub: its tensors, and config.json, which says what it is."""
    timm = pytest.importorskip("timm")
    network = timm.create_model(arch, num_classes=10)
    randomize_batch_norms(network)
    save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {"mean": network.pretrained_cfg["mean"], "std": network.pretrained_cfg["std"]}
    (folder / "config.json").write_text(json.dumps({"architecture": arch, "pretrained_cfg": cfg}))
    return folder / "model.safetensors"


def converted(checkpoint: Checkpoint, folder: Path) -> Path:
    write_backbone(folder / "backbone.pkl", convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
    return folder / "backbone.pkl"


def test_timm_s_own_network_has_the_features(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(timm_file(tmp_path, "resnet18"))
    errors = prove(checkpoint, converted(checkpoint, tmp_path))
    assert {error.against for error in errors} == {"timm's own network"}
    # Their code is another than torchvision's.
    assert type(source_network(checkpoint).model.backbone).__module__ == "timm.models.resnet"


@pytest.mark.parametrize("arch", ["resnetblur18", "resnet26"])
def test_a_reading_as_another_network_than_timm_s_fails(tmp_path: Path, torchvision_file: Maker, arch: str) -> None:
    """A ResNet-18's tensors that are an anti-aliased one's, which no tensor shows, and that are not those of a name."""
    timm_file(tmp_path, "resnet18")
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("resnet18", arch))
    with pytest.raises(ProofFailedError, match=r"by timm's own network.* differ|network .* differ in fc"):
        prove(checkpoint, converted(checkpoint, tmp_path))


def test_torchvision_s_own_network_is_the_reference_of_its_files(torchvision_file: Maker, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    (against,) = {error.against for error in prove(checkpoint, converted(checkpoint, tmp_path))}
    assert against == "torchvision's own network"
    other = replace(checkpoint, spec=replace(checkpoint.spec, arch="resnet34"))
    with pytest.raises(ProofFailedError, match=r"torchvision's own network and resnet18\.pth differ in layer1"):
        source_network(other)


@pytest.mark.parametrize(
    ("layout", "module", "reason"),
    [
        ("training", "", "our reading of the file"),
        ("timm", "timm", "our reading of the file (timm cannot be imported)"),
        ("robustness", "robustness", "our reading of the file (robustness cannot be imported)"),
    ],
)
def test_where_the_makers_code_is_not_there_it_says_so(
    torchvision_file: Maker, monkeypatch: pytest.MonkeyPatch, layout: str, module: str, reason: str
) -> None:
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    checkpoint = replace(read_checkpoint(torchvision_file("resnet18")), layout=layout)
    assert source_network(checkpoint).whose == reason


def test_the_stages_are_those_of_the_network(small_model: nn.Module, tmp_path: Path) -> None:
    """Against the network cut by hand, in the file's own mean and std."""
    spec = BackboneSpec("resnet18", 4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    network = build_backbone(spec)
    checkpoint = Checkpoint(spec, network.state_dict(), None, "torchvision", "x.pth", "")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network.eval()
    x = (images - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    for layer, found in zip(range(1, 5), source_network(checkpoint).stages(images), strict=True):
        x = getattr(network, f"layer{layer}")(x)
        torch.testing.assert_close(found, x)
    with pytest.raises(InputError, match="does not show its stages"):  # as of timm's HRNet
        replace(source_network(checkpoint), layers=("stage1",)).stages(images)


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("torchvision swin", "transformers swin")),
        "transformers vit",
    ],
)
def test_swin_and_vit_are_compared_with_their_makers(kind: str, tmp_path: Path) -> None:
    """Nor does a reading pass that gives two layers each other's tensors: a ViT's, which is the smallest."""
    library, family = kind.split()
    if library == "torchvision":
        source = shaken(models.swin_t(num_classes=3))
        path = save(tmp_path / "source.pth", source.state_dict())
    else:
        of_transformers(family, tmp_path)
        path = tmp_path / "model.safetensors"
    checkpoint = read_checkpoint(path)
    errors = prove(checkpoint, converted(checkpoint, tmp_path))
    (against,) = {error.against for error in errors}
    assert against.startswith(f"{library}'{'' if library.endswith('s') else 's'} own network")
    if library == "torchvision":  # it pads before it shifts, as Detectron2; timm does so after
        assert [found.what.split(" pixels")[0] for found in differences(checkpoint)] == ["at 224"]
    if family != "vit":
        return

    first, second = "blocks.0.norm1.weight", "blocks.0.norm2.weight"
    tensors = dict(checkpoint.state_dict)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    mistaken = replace(checkpoint, state_dict=tensors)
    with pytest.raises(ProofFailedError, match="differ"):
        prove(mistaken, converted(mistaken, tmp_path))


def test_a_file_that_is_not_what_its_config_says_fails(tmp_path: Path) -> None:
    of_transformers("vit", tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 12', '"num_hidden_layers": 11'))
    with pytest.raises(ProofFailedError, match=r"transformers' own network and model\.safetensors differ in vit\."):
        source_network(checkpoint)
    path.write_text(path.read_text().replace('"num_hidden_layers": 11', '"num_hidden_layers": "many"'))
    with pytest.raises(InputError, match=r"builds no network of model\.safetensors by config\.json"):
        source_network(checkpoint)


def test_a_compiled_network_of_torchvision_is_compared_with_its_own(tmp_path: Path) -> None:
    tensors = models.convnext_tiny(num_classes=3).state_dict()
    path = save(tmp_path / "source.pth", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    assert source_network(read_checkpoint(path)).whose == "torchvision's own network"
