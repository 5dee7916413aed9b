"""Fixtures of the detection tests: converted backbones, and a detector small enough for seconds on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

detectron2 = pytest.importorskip("detectron2", reason="Detectron2 is not installed: tools/install_detectron2.py")

from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, write_backbone  # noqa: E402
from robust_backbones.checkpoint.sources import read_checkpoint  # noqa: E402
from robust_backbones.detection.config import CONFIG_DIR, add_config, load_config  # noqa: E402
from robust_backbones.models import BackboneSpec  # noqa: E402

SHAPES_CONFIG = CONFIG_DIR / "quick/mask_rcnn_R_50_FPN_shapes_instant.yaml"
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL: list[object] = [
    *RESNET18,
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 80, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.PRE_NMS_TOPK_TEST", 80),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 40, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 64),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "TEST.VISUALIZE", 0),
]
"""A ResNet-18 with small heads, few proposals and images of 64 px; for load_config, after SHAPES_CONFIG."""


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


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Detectron2's loggers keep writing to the output of the test that set them up: each test sets up its own."""
    yield
    for name in ("detectron2", "fvcore", "robust_backbones"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    setup_logger.cache_clear()


@pytest.fixture
def small_cfg() -> CfgNode:
    """The shapes detector at its smallest."""
    return load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []])


def base_config() -> CfgNode:
    """Detectron2's defaults and our keys."""
    cfg = get_cfg()
    add_config(cfg)
    return cfg


def flat_overrides(spec: BackboneSpec) -> list[object]:
    """What a backbone needs of the configuration, as KEY VALUE pairs."""
    return [item for pair in spec.detectron2_overrides().items() for item in pair]


RETINANET: list[object] = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.NUM_CLASSES", 4, "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.MASK_ON", False),
]
CASCADE: list[object] = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
"""After SMALL: a RetinaNet, and a Cascade R-CNN."""
