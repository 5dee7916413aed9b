"""Regions of interest: ROIAlign with boxes in float32, and C4's heads with the backbone's own res5."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import roi_align

from robust_backbones.cpu.roi_align import roi_align_by_rows

BASIC_BLOCK_DEPTHS = (18, 34)


@ROI_HEADS_REGISTRY.register()
class BackboneRes5ROIHeads(Res5ROIHeads):
    """Detectron2's C4 heads, chosen with ``MODEL.ROI_HEADS.NAME "BackboneRes5ROIHeads"``, with three differences.

    - ``res5`` is the last stage of the backbone's depth; Detectron2's is three bottlenecks also for ResNet-18 and -34.
    - ``MODEL.BACKBONE.FREEZE_AT`` 5 freezes ``res5`` as well: its weights, and its batch norm as FrozenBN.
    - ``MODEL.ROI_HEADS.RES5_NORM`` (``""`` for none, else as ``MODEL.RESNETS.NORM``) is a norm of the output of
      ``res5``, which all heads then see: MoCo's detection protocol (He et al. 2020, appendix A).

    The tensors of ``res5`` have Detectron2's names. The norm is ``res5_norm``, outside of ``res5``, because no backbone
    file can fill it; it is trained even if the backbone is frozen.
    """

    @configurable
    def __init__(self, *, res5_norm: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.res5_norm = nn.Identity() if res5_norm is None else res5_norm

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        arguments["res5_norm"] = get_norm(cfg.MODEL.ROI_HEADS.RES5_NORM, arguments["res5"][-1].out_channels)
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        if cfg.MODEL.RESNETS.DEPTH in BASIC_BLOCK_DEPTHS:
            # The stages before it are built and dropped: it takes 0.1 s and needs no table of depths here.
            blocks = ResNet.make_default_stages(cfg.MODEL.RESNETS.DEPTH, norm=cfg.MODEL.RESNETS.NORM)[-1]
        else:
            blocks = list(super()._build_res5_block(cfg)[0])
        if cfg.MODEL.BACKBONE.FREEZE_AT >= 5:
            for block in blocks:
                block.freeze()
        return nn.Sequential(*blocks), blocks[-1].out_channels

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """R regions of the feature maps -> their features, shape (R, channels of res5, H, W)."""
        return self.res5_norm(super()._shared_roi_transform(features, boxes))


def use_float32_boxes(detector: nn.Module, *, fast: bool) -> None:
    """Replace each ROIAlign by ``Float32BoxesROIAlign``; ``fast``: use ``roi_align_by_rows`` for gradients on a CPU."""
    for parent in [*detector.modules()]:
        for name, child in parent.named_children():
            if type(child) is ROIAlign:
                setattr(parent, name, Float32BoxesROIAlign(child, fast=fast))


class Float32BoxesROIAlign(ROIAlign):
    """ROIAlign with float32 boxes; Detectron2's casts them to the features' type (bfloat16: 4 pixels beyond 512)."""

    def __init__(self, like: ROIAlign, *, fast: bool) -> None:
        super().__init__(like.output_size, like.spatial_scale, like.sampling_ratio, like.aligned)
        self.fast = fast

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # Detectron2's names
        """(N, C, H, W) and R boxes (image, left, top, right, bottom) in the image's pixels -> (R, C, *output_size)."""
        features = input.to(torch.promote_types(input.dtype, torch.float32))
        # It is the backward pass that is slow in torchvision's; its forward pass alone is the faster of both.
        has_gradient = torch.is_grad_enabled() and input.requires_grad
        by_rows = self.fast and has_gradient and input.device.type == "cpu" and len(rois) > 0
        function = roi_align_by_rows if by_rows else roi_align
        pooled = function(
            features,
            rois.to(features.dtype),
            self.output_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )
        return pooled.to(input.dtype)
