"""The backbone taken back out of a fine-tuned detector has the detector's own features, layer by layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.visualization import AscentConfig, activations, invert, noise
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.models import NormalizedModel
from tests.detection.conftest import SMALL

Maker = Callable[[str], Path]
LAYERS = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


def fine_tuned(cfg: CfgNode, weights: Path, folder: Path) -> tuple[nn.Module, NormalizedModel]:
    """A detector whose every weight and statistic has moved since ``weights``, and its backbone read from its file."""
    detector = build_model(cfg).eval()
    checkpointer = BackboneCheckpointer(detector, str(folder), cfg=cfg)
    checkpointer.load(str(weights))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if tensor.is_floating_point() and "pixel_" not in name and "anchor" not in name:
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    checkpointer.save("model_final")
    checkpoint = read_checkpoint(folder / "model_final.pth")
    return detector, NormalizedModel(checkpoint.build(), checkpoint.spec).eval()


def pixels() -> tuple[list[dict[str, Tensor]], Tensor]:
    """The same two images as a detector takes them, uint8, and in [0, 1]."""
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return [{"image": image} for image in images], images.float() / 255


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_features_are_those_of_the_detectors_bottom_up(
    small_cfg: CfgNode, converted: Maker, tmp_path: Path, norm: str
) -> None:
    small_cfg.MODEL.RESNETS.NORM = norm
    detector, model = fine_tuned(small_cfg, converted("resnet18"), tmp_path)
    for_detector, images = pixels()
    with torch.no_grad():
        features = detector.backbone.bottom_up(detector.preprocess_image(for_detector).tensor)
        for name, layer in LAYERS.items():
            assert_equal(activations(model, images, layer), features[name])
        assert_equal(activations(model, images), features["res5"].mean((2, 3)))

    starts = noise(2, 64, seed=0)
    found = invert(model, images[..., :64], starts, ascent=AscentConfig(steps=5, step_size=0.02))
    assert (found.values < found.start_values).all()


def test_features_of_a_c4_detector_whose_res5_is_in_its_heads(converted: Maker, tmp_path: Path) -> None:
    config = CONFIG_DIR / "quick/mask_rcnn_R_50_C4_shapes_instant.yaml"
    cfg = load_config(config, [*SMALL, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []])
    detector, model = fine_tuned(cfg, converted("resnet18"), tmp_path)
    for_detector, images = pixels()
    with torch.no_grad():
        res4 = detector.backbone(detector.preprocess_image(for_detector).tensor)["res4"]
        assert_equal(activations(model, images, "layer3"), res4)
        assert_equal(activations(model, images, "layer4"), detector.roi_heads.res5(res4))
