"""Plain vision transformers as backbones: Detectron2's ViT under its simple feature pyramid (Li et al. 2022).

Width, depth, heads and MLP are those of timm's network ``MODEL.BACKBONE.TIMM``. Windows, relative positions and the
pyramid belong to the detector.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import Block, SimpleFeaturePyramid, ViT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robust_backbones.errors import InputError
from robust_backbones.timm_models import build_timm, is_timm
from robust_backbones.timm_vit import PATCH_SIZE, ViTShape, vit_shape

FEATURE = "last_feat"
"""Name of the last block's output, without a norm after it."""
_SCALES = (4.0, 2.0, 1.0, 0.5)


class RecomputedBlock(Block):
    """A block that stores only its input and recomputes the rest in the backward pass, with the same drop path."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same shape."""
        return checkpoint(super().forward, x, use_reentrant=False)


class PaddedPyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid, with its image size constraint stated so that images are padded to it, and without a norm
    if ``norm`` is empty."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for stage in self.stages:
            for place, layer in enumerate(stage):
                if layer is None:  # which Detectron2 would call
                    stage[place] = nn.Identity()

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}


@BACKBONE_REGISTRY.register()
def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PaddedPyramid:
    """``MODEL.BACKBONE.TIMM`` as a ViT under the simple feature pyramid, p2 to p6.

    Raises:
        InputError: timm has no such network, Detectron2's ViT cannot be it, or a key of ``MODEL.VIT`` does not fit.
    """
    return PaddedPyramid(
        net=build_vit(cfg),
        in_feature=FEATURE,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=_SCALES,
        top_block=LastLevelMaxPool(),
        norm=cfg.MODEL.FPN.NORM,
        square_pad=cfg.MODEL.VIT.SQUARE_SIZE,
    )


def build_vit(cfg: CfgNode) -> ViT:
    """Detectron2's ViT by ``MODEL.BACKBONE`` and ``MODEL.VIT``; normalised images (N, 3, H, W) -> stride 16.

    Raises:
        InputError: as ``build_vit_sfp_backbone``.
    """
    backbone, keys = cfg.MODEL.BACKBONE, cfg.MODEL.VIT
    if not is_timm(backbone.TIMM):
        raise InputError(f"timm has no network {backbone.TIMM!r}: give MODEL.BACKBONE.TIMM one of timm.list_models()")
    shape = vit_shape(backbone.TIMM, keys.PRETRAIN_SIZE)
    check_keys(cfg, shape)
    with warnings.catch_warnings():  # Detectron2 asks for timm's layers by their old name
        warnings.simplefilter("ignore", FutureWarning)
        vit = ViT(
            img_size=keys.SQUARE_SIZE or keys.PRETRAIN_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_ratio,
            qkv_bias=shape.qkv_bias,
            drop_path_rate=backbone.DROP_PATH,
            norm_layer=partial(nn.LayerNorm, eps=keys.NORM_EPSILON or shape.epsilon),
            use_rel_pos=keys.REL_POS,
            window_size=keys.WINDOW_SIZE,
            window_block_indexes=tuple({*range(shape.depth)} - {*keys.GLOBAL_BLOCKS}),
            pretrain_img_size=keys.PRETRAIN_SIZE,
            pretrain_use_cls_token=shape.embeds_class,
            out_feature=FEATURE,
        )
    if shape.has_convstem:
        stem = build_timm(backbone.TIMM, 1, keys.PRETRAIN_SIZE).get_submodule("patch_embed.proj")
        vit.set_submodule("patch_embed.proj", stem)
    freeze(vit, backbone.FREEZE_AT)
    for block in vit.blocks if backbone.USE_ACT_CHECKPOINT else ():
        block.__class__ = RecomputedBlock  # with the same parts
    return vit


def check_keys(cfg: CfgNode, shape: ViTShape) -> None:
    """Raise InputError for windows, blocks, relative positions or images that do not fit, by their keys."""
    keys, inputs = cfg.MODEL.VIT, cfg.INPUT
    square = keys.SQUARE_SIZE
    if square < 0 or square % (2 * PATCH_SIZE):
        raise InputError(f"MODEL.VIT.SQUARE_SIZE {square} is no multiple of {2 * PATCH_SIZE} pixels: give one, or 0")
    if beyond := [index for index in keys.GLOBAL_BLOCKS if not 0 <= index < shape.depth]:
        raise InputError(
            f"MODEL.VIT.GLOBAL_BLOCKS has {beyond[0]}, and {cfg.MODEL.BACKBONE.TIMM} has the blocks 0 to "
            f"{shape.depth - 1}: give some of these"
        )
    side = square // PATCH_SIZE
    if keys.WINDOW_SIZE < 0 or 0 < side < keys.WINDOW_SIZE:
        raise InputError(
            f"MODEL.VIT.WINDOW_SIZE {keys.WINDOW_SIZE} does not fit into the {side} patches of a side of "
            f"MODEL.VIT.SQUARE_SIZE {square}: give a smaller one, or 0 for no windows"
        )
    if keys.REL_POS and not square:
        raise InputError("MODEL.VIT.REL_POS needs images of one size: give MODEL.VIT.SQUARE_SIZE")
    if square and not inputs.MIN_SIZE_TEST:
        raise InputError("INPUT.MIN_SIZE_TEST 0 leaves images as large as they are, for MODEL.VIT.SQUARE_SIZE give it")
    trained = (
        ("SCALE_JITTER", inputs.SCALE_JITTER[2]) if inputs.SCALE_JITTER else ("MAX_SIZE_TRAIN", inputs.MAX_SIZE_TRAIN)
    )
    for key, pixels in (trained, ("MAX_SIZE_TEST", inputs.MAX_SIZE_TEST)):
        if square and pixels > square:
            raise InputError(
                f"INPUT.{key} lets images have {pixels} pixels a side, and MODEL.VIT.SQUARE_SIZE is {square}, beyond "
                f"which they would be cut off: give up to {square} pixels"
            )


def freeze(vit: ViT, freeze_at: int) -> None:
    """Freeze the first parts, and their drop path: 1 the embeddings, 2 to 5 another quarter of the blocks each.

    Relative positions are still trained, because they were not pre-trained.
    """
    depth = len(vit.blocks)
    blocks = [*vit.blocks[: depth * max(freeze_at - 1, 0) // 4]]
    frozen = [*vit.patch_embed.parameters(), vit.pos_embed] if freeze_at >= 1 else []
    for block in blocks:
        block.drop_path = nn.Identity()
        frozen += [value for name, value in block.named_parameters() if ".rel_pos_" not in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
