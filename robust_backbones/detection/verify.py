"""The proof of a conversion: on one image, Detectron2's res2-res5 equal the source network's layer1-layer4."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch import Tensor

from robust_backbones.checkpoints import Checkpoint
from robust_backbones.convert import read_backbone
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import CONFIG_DIR, flat_overrides, load_config
from robust_backbones.models import NormalizedModel

TOLERANCE = 1e-4
"""Largest relative error that float32 rounding explains; a wrong stride, order or scale gives 0.01 and more."""


@torch.no_grad()
def feature_errors(checkpoint: Checkpoint, converted: Path, *, size: int = 224) -> dict[str, float]:
    """Largest relative error of each stage, max|difference| / max|source|, by Detectron2's stage names.

    The converted file goes the way that training goes: configuration, model, checkpoint guard, and the detector's
    own preprocessing of a uint8 image. The reference is torchvision's network on the same image in [0, 1].
    """
    _, metadata = read_backbone(converted)
    cfg = load_config(CONFIG_DIR / "Base-RCNN-FPN.yaml", [*flat_overrides(metadata.spec), "MODEL.DEVICE", "cpu"])
    detector = build_model(cfg).eval()
    BackboneCheckpointer(detector, cfg=cfg).load(str(converted))

    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    in_format = image if cfg.INPUT.FORMAT == "RGB" else image.flip(0)
    features = detector.backbone.bottom_up(detector.preprocess_image([{"image": in_format}]).tensor)

    reference = NormalizedModel(checkpoint.build(), checkpoint.spec).eval().stages(image[None] / 255)
    return {
        stage: _relative_error(features[stage], reference[layer])
        for stage, layer in (("res2", "layer1"), ("res3", "layer2"), ("res4", "layer3"), ("res5", "layer4"))
    }


def _relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()
