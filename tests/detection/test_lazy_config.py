"""Mask R-CNN on Swin from our YAML is the one that Detectron2's LazyConfig objects make: same weights, same losses."""

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, GeneralizedRCNN, SwinTransformer
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from robust_backbones.detection.config import load_config
from robust_backbones.detection.predictor import build_detector
from tests.detection import tiny_networks  # noqa: F401

LEVELS = ("p2", "p3", "p4", "p5", "p6")
TASK = ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "protocols/swin.yaml", "architectures/swin_t.yaml")
# What the small case has instead of Detectron2's sizes: FPN and mask head, box head.
SMALL_HEADS = (16, 32)


def detectron2s(swin: dict[str, Any], channels: int, width: int) -> nn.Module:
    """Detectron2's Mask R-CNN with FPN, part by part; ``swin`` are the arguments of its backbone."""

    def pooler(side: int) -> Any:
        strides = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
        return L(ROIPooler)(output_size=side, scales=strides, sampling_ratio=0, pooler_type="ROIAlignV2")

    sizes = [[32], [64], [128], [256], [512]]
    anchors = L(DefaultAnchorGenerator)(
        sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64], offset=0.0
    )
    proposals = L(RPN)(
        in_features=LEVELS,
        head=L(StandardRPNHead)(in_channels=channels, num_anchors=3),
        anchor_generator=anchors,
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
    )
    box_head = L(FastRCNNConvFCHead)(
        input_shape=ShapeSpec(channels=channels, height=7, width=7), conv_dims=[], fc_dims=[width, width]
    )
    predictor = L(FastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=width),
        test_score_thresh=0.05,
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes=80,
    )
    heads = L(StandardROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
        box_in_features=LEVELS[:4],
        box_pooler=pooler(7),
        box_head=box_head,
        box_predictor=predictor,
        mask_in_features=LEVELS[:4],
        mask_pooler=pooler(14),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=channels, width=14, height=14),
            num_classes=80,
            conv_dims=[channels] * 5,
        ),
    )
    model: nn.Module = instantiate(
        L(GeneralizedRCNN)(
            backbone=L(FPN)(
                bottom_up=L(SwinTransformer)(**swin),
                in_features=("p0", "p1", "p2", "p3"),
                out_channels=channels,
                top_block=L(LastLevelMaxPool)(),
            ),
            proposal_generator=proposals,
            roi_heads=heads,
            pixel_mean=[123.675, 116.28, 103.53],
            pixel_std=[58.395, 57.12, 57.375],
            input_format="RGB",
        )
    )
    return model


def batch(side: int) -> list[dict[str, Any]]:
    """Two images with three objects each, of several sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for classes in ([1, 5, 79], [0, 5, 7]):
        corners = torch.rand(3, 2, generator=generator) * side / 2
        boxes = torch.cat([corners, corners + side * torch.tensor([[0.15], [0.3], [0.45]])], dim=1)
        columns, rows = torch.arange(side)[None, None], torch.arange(side)[None, :, None]
        left, top, right, bottom = (edge[:, None, None] for edge in boxes.unbind(1))
        masks = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
        instances = Instances((side, side), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.tensor(classes)
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        made.append({"image": image, "height": side, "width": side, "instances": instances})
    return made


@pytest.mark.parametrize(
    ("arch", "swin", "heads", "side", "fast_roi_align"),
    [
        (
            "tiny_swin",
            {
                "embed_dim": 8,
                "depths": [2, 1, 2, 2],
                "num_heads": [1, 2, 2, 4],
                "window_size": 2,
                "drop_path_rate": 0.2,
            },
            SMALL_HEADS,
            96,
            True,
        ),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "drop_path_rate": 0.2},
            SMALL_HEADS,
            96,
            False,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_and_gradients_of_an_iteration_are_those_of_lazy_config(
    arch: str, swin: dict[str, Any], heads: tuple[int, int], side: int, fast_roi_align: bool
) -> None:
    """In training, with stochastic depth: the same weights, images, sampled boxes and blocks that are left out."""
    channels, width = heads
    sizes = ["MODEL.FPN.OUT_CHANNELS", channels, "MODEL.ROI_BOX_HEAD.FC_DIM", width]
    sizes += ["MODEL.ROI_MASK_HEAD.CONV_DIM", channels, "MODEL.BACKBONE.TIMM", arch, "MODEL.DEVICE", "cpu"]
    sizes += ["SOLVER.AMP.ENABLED", False, "MODEL.FAST_ROI_ALIGN", fast_roi_align]
    torch.manual_seed(0)
    ours, theirs = build_detector(load_config(TASK, sizes)).train(), detectron2s(swin, channels, width).train()
    with torch.no_grad():
        for parameter in ours.backbone.bottom_up.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        with EventStorage():
            losses = model(batch(side))
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(({name: loss.item() for name, loss in losses.items()}, gradients))
    (losses, gradients), (wanted, wanted_gradients) = found
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert len(losses) == 5
    assert gradients.keys() == wanted_gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
