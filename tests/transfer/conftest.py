"""The trained network as a checkpoint, and the shapes as a transfer data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import val_transform
from robust_backbones.models import BackboneSpec, NormalizedModel
from robust_backbones.threat_models import ThreatModel

Trained = tuple[NormalizedModel, Tensor, Tensor]


@pytest.fixture(scope="session")
def checkpoint(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A ResNet-18 that knows the four shapes."""
    path = tmp_path_factory.mktemp("checkpoint") / "trained.pt"
    spec, weights = BackboneSpec("resnet18", 4), trained[0].backbone.state_dict()
    write_checkpoint(path, spec=spec, state_dict=weights, threat_model=ThreatModel("L2", 0.25))
    return read_checkpoint(path)


@pytest.fixture
def data(shapes: Path) -> TransferData:
    """32 images to train on and 16 to test, of four classes and 32 px."""
    return open_transfer_data(str(shapes / "shapes_classification"), None, val_transform(32, resize=32))
