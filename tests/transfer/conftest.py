"""A narrow ResNet in place of ResNet-18, a checkpoint of one that is trained, and the shapes as a transfer data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from robust_backbones import models
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.synthetic import ShapesConfig, write_shapes
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import val_transform
from robust_backbones.models import BackboneSpec, NormalizedModel, ResNetShape, build_backbone, reference_shapes
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer import networks


class NarrowResNet(ResNet):
    """A block a stage of an eighth of ResNet-18's channels: the same modules, a hundredth of the weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(self.inplanes, num_classes) if num_classes else nn.Identity()

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **options)


@contextmanager
def narrow() -> Iterator[None]:
    """Within it, ``resnet18`` is a ``NarrowResNet``."""
    original_build, original_shapes = models._build, models._resnet_shapes

    def build(arch: str, num_classes: int, stem: str) -> nn.Module:
        return NarrowResNet(num_classes) if arch == "resnet18" else original_build(arch, num_classes, stem)

    def shapes(shape: ResNetShape, stem: str) -> dict[str, tuple[int, ...]]:
        if shape != ResNetShape(18):
            return original_shapes(shape, stem)
        tensors = NarrowResNet(1).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not models.is_counter(name)}

    def forget() -> None:
        reference_shapes.cache_clear()
        networks._drawn_classifier.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_build", build)
        patch.setattr(models, "_resnet_shapes", shapes)
        forget()
        yield
    forget()


@pytest.fixture(scope="module")
def narrow_resnet18() -> Iterator[None]:
    """For the tests of a module, ``resnet18`` is a ``NarrowResNet``."""
    with narrow():
        yield


@pytest.fixture(scope="session")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow network that knows the four shapes."""
    with narrow():
        return train(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def checkpoint(narrow_resnet18: None, trained_file: Path) -> Checkpoint:
    return read_checkpoint(trained_file)


def train(root: Path) -> Path:
    write_shapes(root, ShapesConfig(64, 1, 1, 1, image_size=32))
    dataset = open_dataset(root / "shapes_classification/train", val_transform(32, resize=32))
    images, labels = torch.stack([image for image, _ in dataset]).float() / 255, torch.tensor(dataset.labels)
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for rows in torch.randperm(len(images), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    path, weights = root / "trained.pt", model.backbone.state_dict()
    write_checkpoint(path, spec=spec, state_dict=weights, threat_model=ThreatModel("L2", 0.25))
    return path


@pytest.fixture
def data(shapes: Path) -> TransferData:
    """32 images to train on and 16 to test, of four classes and 32 px."""
    return open_transfer_data(str(shapes / "shapes_classification"), None)
