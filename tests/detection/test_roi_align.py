"""The type that boxes keep in ROIAlign, and both of its ways in a whole detector."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align

from robust_backbones.detection.roi_heads import Float32BoxesROIAlign
from robust_backbones.detection.trainer import Trainer


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_boxes_are_not_rounded_to_the_features_type(dtype: torch.dtype, fast: bool) -> None:
    """The features are a ramp of powers of two, exact in every type, so that only a box's place can go wrong."""
    ramp = (torch.arange(1024) // 256 * 4).to(dtype).expand(1, 1, 2, 1024).requires_grad_()
    box = torch.tensor([[0, 767.0, 0, 769.0, 1]])  # in bfloat16: 768 to 768, no area
    found = Float32BoxesROIAlign(ROIAlign((1, 2), 1.0, 1), fast=fast)(ramp, box)
    assert found.dtype == dtype
    assert found.flatten().tolist() == [8, 12]


def test_only_where_there_is_a_gradient_is_it_another_way() -> None:
    """The forward pass alone is torchvision's, to the bit."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 8, 16, 16, generator=generator, requires_grad=True)
    corners = torch.rand(20, 2, generator=generator) * 8
    boxes = torch.cat([torch.zeros(20, 1), corners, corners + torch.rand(20, 2, generator=generator) * 8], dim=1)
    align = Float32BoxesROIAlign(ROIAlign((3, 3), 1.0, 0), fast=True)
    theirs = roi_align(features, boxes, (3, 3), aligned=True)
    with torch.no_grad():
        assert torch.equal(align(features, boxes), theirs)
    assert "RoiAlign" not in type(align(features, boxes).grad_fn).__name__
    torch.testing.assert_close(align(features, boxes), theirs)


@pytest.mark.parametrize("fast", [True, False])
def test_no_boxes_give_none(fast: bool) -> None:
    features = torch.ones(1, 2, 4, 4, requires_grad=True)
    found = Float32BoxesROIAlign(ROIAlign((3, 3), 1.0, 0), fast=fast)(features, torch.zeros(0, 5))
    assert found.shape == (0, 2, 3, 3)
    found.sum().backward()
    assert features.grad is not None


def test_a_detectors_losses_and_gradients_are_the_same(small_cfg: CfgNode) -> None:
    """Both kinds of heads, boxes of many sizes; the first losses, since training makes differences of rounding grow."""
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Instances((96, 128), gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 70], [50, 10, 127, 90], [3, 70, 20, 80]])))
    found.gt_classes = torch.tensor([0, 1, 2])
    found.gt_masks = BitMasks(torch.ones(3, 96, 128, dtype=torch.bool))
    losses, gradients = [], []
    for fast in (True, False):
        small_cfg.MODEL.FAST_ROI_ALIGN = fast
        torch.manual_seed(0)
        model = Trainer.build_model(small_cfg).train()
        aligns = [module for module in model.modules() if isinstance(module, ROIAlign)]
        assert len(aligns) == 8  # four levels of boxes, four of masks
        assert all(isinstance(module, Float32BoxesROIAlign) and module.fast == fast for module in aligns)
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model([{"image": image, "instances": found}]))
        sum(losses[-1].values()).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert losses[0].keys() == losses[1].keys() >= {"loss_mask", "loss_box_reg"}
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * scale)
