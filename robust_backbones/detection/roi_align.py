"""ROIAlign (He et al. 2017, "Mask R-CNN", section 3) with boxes in float32 whatever the features' type."""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from torch import Tensor, nn
from torchvision.ops import roi_align

from robust_backbones.cpu.roi_align import roi_align_by_rows


def use_float32_boxes(detector: nn.Module, *, fast: bool) -> None:
    """Put ``Float32BoxesROIAlign`` in the place of each ROIAlign of a detector.

    Args:
        fast: on CPUs, ``roi_align_by_rows`` instead of torchvision's operator.
    """
    for parent in [*detector.modules()]:
        for name, child in parent.named_children():
            if type(child) is ROIAlign:
                setattr(parent, name, Float32BoxesROIAlign(child, fast=fast))


class Float32BoxesROIAlign(ROIAlign):
    """Detectron2's ROIAlign, whose boxes stay in float32 where its features are not.

    Detectron2 rounds boxes to the features' type: in bfloat16, to 4 pixels beyond pixel 512.
    """

    def __init__(self, like: ROIAlign, *, fast: bool) -> None:
        super().__init__(like.output_size, like.spatial_scale, like.sampling_ratio, like.aligned)
        self.fast = fast

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # Detectron2's names
        """Features (N, C, H, W) and R boxes (image, left, top, right, bottom), in the image's pixels.

        Returns:
            (R, C, *output_size), of the features' type; computed in float32 at least.
        """
        features = input.to(torch.promote_types(input.dtype, torch.float32))
        by_rows = self.fast and input.device.type == "cpu" and len(rois) > 0
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
