"""Fixtures of the detection tests: converted backbones, and a detector small enough for seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed: tools/install_detectron2.py")

from detectron2.config import CfgNode  # noqa: E402

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, write_backbone  # noqa: E402
from robust_backbones.checkpoint.sources import read_checkpoint  # noqa: E402
from robust_backbones.detection.config import CONFIG_DIR, load_config  # noqa: E402

SHAPES_CONFIG = CONFIG_DIR / "quick/mask_rcnn_R_50_FPN_shapes_instant.yaml"
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


@pytest.fixture(scope="session")
def converted(
    torchvision_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Maker of converted backbones, one an architecture."""
    folder = tmp_path_factory.mktemp("converted")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.pkl"
        if not path.exists():
            checkpoint = read_checkpoint(torchvision_file(arch))
            write_backbone(path, convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
        return path

    return make


@pytest.fixture
def small_cfg() -> CfgNode:
    """The shapes detector with a ResNet-18."""
    return load_config(SHAPES_CONFIG, [*RESNET18, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []])
