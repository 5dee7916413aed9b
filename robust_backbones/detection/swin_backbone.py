"""Detectron2's own Swin Transformer under a feature pyramid, with the shape of one of timm's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.swin import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robust_backbones.detection.timm_backbone import STAGES, options, pyramid
from robust_backbones.errors import InputError
from robust_backbones.timm_models import STRIDES, is_swin, is_timm, keep_paths, swin_shape


class RecomputedSwinBlock(SwinTransformerBlock):
    """A block that stores only its input and recomputes the rest in the backward pass, with the same drop path."""

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        """(N, tokens, C) -> the same shape."""
        return checkpoint(super().forward, x, mask_matrix, use_reentrant=False)


class SwinBackbone(SwinTransformer):
    """Detectron2's Swin (Liu et al. 2021) with a ResNet's stage names: ``res2`` at stride 4 to ``res5`` at 32.

    Each stage ends in a layer norm that the classifier does not have: it starts as plain normalisation, and is trained
    with the detector. If the windows divide the feature maps, with more than one window a side, the stages before these
    norms equal timm's. Otherwise they do not: Detectron2 pads before shifting windows and timm after, and timm does not
    shift a single window.

    Args:
        arch: timm's name, such as ``swin_tiny_patch4_window7_224``.
        freeze_at: frozen stages, as ``MODEL.BACKBONE.FREEZE_AT``: 1 the stem, 2 ``res2`` too, up to 5; a stage ends
            with the merging of its patches, not with its norm.
        drop_path: as ``MODEL.BACKBONE.DROP_PATH``; frozen blocks are never dropped.
        recompute: as ``MODEL.BACKBONE.USE_ACT_CHECKPOINT``.
        window_size: as ``MODEL.SWIN.WINDOW_SIZE``; 0: timm's.

    Raises:
        InputError: timm has no such Swin; or Detectron2 cannot build it, because its windows differ.
    """

    def __init__(
        self,
        arch: str,
        *,
        freeze_at: int = 0,
        drop_path: float = 0.0,
        recompute: bool = False,
        window_size: int = 0,
    ) -> None:
        if not (is_timm(arch) and is_swin(arch)):
            raise InputError(
                f"timm has no Swin {arch!r}: give MODEL.BACKBONE.TIMM one of timm.list_models('swin_*_patch4_*')"
            )
        shape = swin_shape(arch)
        with warnings.catch_warnings():
            # Detectron2 knows a layer of timm by its former place, and meshgrid's former default.
            warnings.simplefilter("ignore")
            super().__init__(
                embed_dim=shape.embed_dim,
                depths=shape.depths,
                num_heads=shape.num_heads,
                window_size=window_size or shape.window_size,
                drop_path_rate=drop_path,
                frozen_stages=freeze_at or -1,
            )
        keep_paths(self, frozen=True)
        for stage in self.layers if recompute else ():
            for block in stage.blocks:
                block.__class__ = RecomputedSwinBlock  # with the same parts
        self._out_features = list(STAGES)
        self._out_feature_channels = dict(zip(STAGES, self.num_features, strict=True))
        self._out_feature_strides = dict(zip(STAGES, STRIDES, strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) -> stages (N, C, H / stride, W / stride) by name."""
        return dict(zip(STAGES, super().forward(images).values(), strict=True))


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.BACKBONE.TIMM``, a Swin, under a feature pyramid, p2 to p6, as ``build_resnet_fpn_backbone``."""
    network = SwinBackbone(cfg.MODEL.BACKBONE.TIMM, window_size=cfg.MODEL.SWIN.WINDOW_SIZE, **options(cfg))
    return pyramid(network, cfg)


def resized_biases(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The relative position biases of a file with another window size than the model's, interpolated to fit.

    Interpolated as in timm; by the file's names, which are suffixes of the model's.
    """
    from timm.layers import resize_rel_pos_bias_table

    wanted = {name: t.shape for name, t in model.state_dict().items() if name.endswith("relative_position_bias_table")}
    found = {}
    for name, table in tensors.items():
        shape = next((shape for full, shape in wanted.items() if f".{full}".endswith(f".{name}")), table.shape)
        if shape != table.shape and shape[1] == table.shape[1]:
            side = (math.isqrt(shape[0]) + 1) // 2
            found[name] = resize_rel_pos_bias_table(table, (side, side), tuple(shape)).contiguous()
    return found
