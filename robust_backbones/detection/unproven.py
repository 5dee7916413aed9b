"""What the proof of a conversion does not cover, because detector and source differ there: measured and printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling.backbone.utils import get_abs_pos
from torch import Tensor

from robust_backbones.checkpoint.convert import convert
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.detection.source_networks import source_network
from robust_backbones.detection.swin_backbone import SwinBackbone
from robust_backbones.detection.verify import TOLERANCE, inputs, sides
from robust_backbones.models import NormalizedModel, only_in_timm
from robust_backbones.timm_models import is_swin
from robust_backbones.timm_vit import PATCH_SIZE, is_vit, vit_shape, without_class_token

DETECTION_SIZE = 1024
"""Size of ViTDet's images, in pixels."""


@dataclass(frozen=True)
class Difference:
    """One thing that a detector's backbone computes differently, and by how much."""

    what: str
    image: str
    """``random``, or the image file's name; empty if no image is involved."""
    relative: float
    """max|difference| / max|of the source|."""

    def __str__(self) -> str:
        return f"not proven: {self.what}: {self.relative:.1e}{f' ({self.image})' if self.image else ''}"


@torch.no_grad()
def differences(checkpoint: Checkpoint, *, image: str | Path | None = None) -> list[Difference]:
    """For a ViT, the effects of its class token and of interpolating its position embeddings; for a Swin, of image
    sizes; for others, none. Rounding does not count as a difference."""
    spec = checkpoint.spec
    if only_in_timm(spec.arch) and is_swin(spec.arch):
        return _of_swin(checkpoint)
    if not (only_in_timm(spec.arch) and is_vit(spec.arch)):
        return []
    found = []
    if "cls_token" in checkpoint.state_dict:
        whole, patches = checkpoint.model(), checkpoint.model()
        without_class_token(patches.backbone)
        for name, _, pixels in inputs(spec.channel_order, spec, Path(image) if image else None):
            features = [_last_features(model, pixels[None] / 255) for model in (whole, patches)]
            what = "the source's features with its class token, which no detector has, differ from those without it"
            found.append(Difference(what, name, _relative(features[1], features[0])))
    wanted, ours = position_embeddings(checkpoint, DETECTION_SIZE // PATCH_SIZE)
    what = (
        f"position embeddings at {DETECTION_SIZE} pixels, bicubic in Detectron2, differ from timm's antialiased bicubic"
    )
    return [*found, Difference(what, "", _relative(ours, wanted))]


def _of_swin(checkpoint: Checkpoint) -> list[Difference]:
    """At the next size after the proof's, and at half of it, where Detectron2 shifts windows differently."""
    ours, source, proven = SwinBackbone(checkpoint.spec.arch).eval(), source_network(checkpoint), sides(checkpoint.spec)
    ours.load_state_dict(convert(checkpoint)[0], strict=False)  # but for its own norms
    why = {
        proven.step: "the last stage is one window, which the source does not shift",
        proven.step
        + 32: "windows do not divide the stages, which Detectron2 pads before it shifts them, the source after",
    }
    found = []
    for size, reason in why.items():
        _, pixels, _ = next(iter(inputs(checkpoint.spec.channel_order, checkpoint.spec, size=size)))
        images = pixels[None] / 255
        stages = zip(ours(source.model.normalize(images)).values(), source.stages(images), strict=True)
        largest = max(_relative(one, other) for one, other in stages)
        if not largest < TOLERANCE:
            what = f"at {size} pixels ({reason}) features differ from the source's"
            found.append(Difference(what, "random", largest))
    return found


def position_embeddings(checkpoint: Checkpoint, side: int) -> tuple[Tensor, Tensor]:
    """Those for ``side`` x ``side`` patches, each (1, side, side, C), as resized by timm and by Detectron2."""
    from timm.layers import resample_abs_pos_embed

    embeds_class = vit_shape(checkpoint.spec.arch, checkpoint.spec.image_size).embeds_class
    stored = checkpoint.state_dict["pos_embed"]
    patches = stored[:, int(embeds_class) :]
    of_timm = resample_abs_pos_embed(patches, [side, side], num_prefix_tokens=0).unflatten(1, (side, side))
    return of_timm, get_abs_pos(stored, embeds_class, (side, side))


def _last_features(model: NormalizedModel, images: Tensor) -> Tensor:
    """Images in [0, 1] -> the last block's features, (N, C, H, W)."""
    network: Any = model.backbone
    last = len(network.blocks) - 1
    outputs = network.forward_intermediates(
        model.normalize(images), indices=[last], norm=False, output_fmt="NCHW", intermediates_only=True
    )
    return outputs[0]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
