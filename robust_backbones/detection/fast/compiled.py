"""Backbone, FPN and RPN head as one graph (``MODEL.COMPILE``), for batches that are padded to a few shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor

BACKEND = "inductor"
_RATIOS = (1, 1.34, 1.51, 1.78)
"""Ratios of long to short sides: 4:3, 3:2 and 16:9 of most cameras, a little larger because of whole pixels."""
_GRAPHS = 64
"""More than the number of shapes, with and without an attack; PyTorch's own limit is 8, then it compiles no more."""

Outputs = tuple[dict[str, Tensor], tuple[list[Tensor], list[Tensor]]]


def fixed_sides(cfg: CfgNode) -> tuple[int, ...]:
    """The sides to which a batch of training images is padded, in pixels and ascending, at most 5.

    In a batch of only landscape, or only portrait, images one side is the first of them: at most 9 shapes.
    """
    short, longest = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if cfg.INPUT.SCALE_JITTER:
        short = longest = cfg.INPUT.SCALE_JITTER[2]
    sides = [*(min(short * ratio, longest) for ratio in _RATIOS), longest]
    return tuple(sorted({int(-(-side // 32) * 32) for side in sides}))


def dense(backbone: Backbone, rpn: RPN, images: Tensor) -> Outputs:
    """The feature maps of a batch, (N, 3, H, W), and the RPN head's logits and deltas for each."""
    features = backbone(images)
    return features, rpn.rpn_head([features[name] for name in rpn.in_features])


def compiled_dense(backbone: Backbone, rpn: RPN, images: Tensor) -> Outputs:
    """The same, compiled for each shape of ``images``; modules and names of tensors do not change."""
    with torch._dynamo.config.patch(cache_size_limit=_GRAPHS):  # PyTorch 2.6's name, which later ones know too
        outputs: Outputs = _compile(BACKEND)(backbone, rpn, images)
    return outputs


@functools.cache
def _compile(backend: str) -> Callable[..., Any]:
    return torch.compile(dense, dynamic=False, backend=backend)
