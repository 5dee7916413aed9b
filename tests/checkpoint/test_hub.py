"""Backbones on the Hugging Face hub: what is pushed comes back bit-identical, and timm loads it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, read_backbone, write_backbone
from robust_backbones.checkpoint.hub import CONFIG, PROCESSOR, WEIGHTS, _pretrained_cfg, fetch
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.models import BackboneSpec
from robust_backbones.threat_models import ThreatModel
from tests.hub import FakeHub, hub_fixture  # noqa: F401

Maker = Callable[[str], Path]
RunTool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def robust(torchvision_file: Maker, tmp_path: Path) -> Path:
    """A converted backbone that is fed in its own way."""
    checkpoint = replace(read_checkpoint(torchvision_file("resnet18")), threat_model=ThreatModel("L2", 3))
    spec = replace(checkpoint.spec, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = tmp_path / "robust.pkl"
    write_backbone(path, convert(checkpoint)[0], BackboneMetadata.of(replace(checkpoint, spec=spec)))
    return path


def test_timm_resizes_to_the_size_that_is_meant() -> None:
    """It divides by the quotient that config.json has, and rounds down."""
    for size in (32, 45, 224, 245, 299):
        for resize in range(size, 2 * size):
            quotient = _pretrained_cfg(BackboneSpec(image_size=size, val_resize=resize))["crop_pct"]
            assert math.floor(size / quotient) == round(size / quotient) == resize
            assert quotient == pytest.approx(size / resize, abs=1e-15)


def test_what_is_pushed_comes_back(hub: FakeHub, run_tool: RunTool, robust: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    status, out, error = run_tool("convert", robust, folder, "--to", "timm", "--push", "lab/robust", "--private")
    assert status == 0, error
    assert f"uploaded to {hub.url}/lab/robust" in out
    assert {name.rpartition("/")[2] for name in hub.files} == {"model.safetensors", "config.json", "README.md"}
    card = hub.files["/lab/robust/resolve/main/README.md"].decode()
    for part in ("resnet18", "L2:3", "0.1", "0.4", "convert hub:lab/robust", read_checkpoint(robust).source_sha256):
        assert part in card

    status, _, error = run_tool("convert", "hub:lab/robust", tmp_path / "back.pkl", "--no-verify")
    assert status == 0, error
    (tensors, metadata), (back, said) = read_backbone(robust), read_backbone(tmp_path / "back.pkl")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in tensors.items())
    assert (said.spec, said.threat_model) == (replace(metadata.spec, num_classes=0), "L2:3")


def test_what_says_mean_and_std_comes_too(hub: FakeHub) -> None:
    """Repositories of transformers have preprocessor_config.json, timm's have none."""
    for repository, names in {"hf": (WEIGHTS, CONFIG, PROCESSOR), "timm": (WEIGHTS, CONFIG)}.items():
        hub.files |= {f"/lab/{repository}/resolve/main/{name}": b"{}" for name in names}
        path = fetch(f"lab/{repository}")
        assert {other.name for other in path.parent.iterdir()} == {*names}


def test_timm_loads_the_folder(run_tool: RunTool, torchvision_file: Maker, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    folder = tmp_path / "folder"
    assert run_tool("convert", torchvision_file("resnet18"), folder, "--to", "timm")[0] == 0
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), checkpoint.build()(images))
    assert tuple(network.pretrained_cfg["mean"]) == checkpoint.spec.mean


def test_one_file_of_timm_s_says_what_it_was_fed_with(run_tool: RunTool, robust: Path, tmp_path: Path) -> None:
    path = tmp_path / "robust.safetensors"
    assert run_tool("convert", robust, path, "--to", "timm")[0] == 0
    assert read_checkpoint(path).spec.mean == (0.1, 0.2, 0.3)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(json.loads(header)["__metadata__"]["pretrained_cfg"])["std"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hub:lab/none", "out.pkl"), "lab/none"),
        (("SRC", "out.pkl", "--push", "lab/robust"), "give --to timm"),
        (("SRC", "out", "--to", "timm", "--push", "robust"), "USER/NAME"),
        (("SRC", "out.pth", "--to", "timm"), "be a folder or end in .safetensors"),
        (("SRC", "out", "--to", "timm", "--push", "lab/forbidden"), "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_or_had_is_refused(
    hub: FakeHub, run_tool: RunTool, robust: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if "lab/forbidden" in arguments:
        hub.error = (403, "")
    source, target, *options = (str(robust) if word == "SRC" else word for word in arguments)
    status, _, error = run_tool("convert", source, tmp_path / target, *options, *("--no-verify",))
    assert status == 2
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
