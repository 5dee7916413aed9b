"""Anchors, and the RPN's proposals from them (Ren et al. 2015, section 3), for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor
from torchvision.ops import nms

from robust_backbones.detection.fast.matching import rows


def grid_anchors(generator: DefaultAnchorGenerator, features: Sequence[Tensor]) -> list[Tensor]:
    """Detectron2's anchors of each feature map, shape (H * W * anchors of a cell, 4), made on the device."""
    anchors = []
    for feature, stride, cell in zip(features, generator.strides, generator.cell_anchors, strict=True):
        down, right = (
            torch.arange(generator.offset * stride, size * stride, step=stride, dtype=torch.float32, device=cell.device)
            for size in feature.shape[-2:]
        )
        y, x = torch.meshgrid(down, right, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
        anchors.append((shifts + cell).view(-1, 4))
    return anchors


@torch.no_grad()
def propose(
    rpn: RPN, anchors: Sequence[Tensor], logits: Sequence[Tensor], deltas: Sequence[Tensor], corners: Tensor
) -> tuple[Tensor, Tensor]:
    """The proposals for training: the best of each level, decoded, clipped, and after non-maximum suppression.

    Boxes that are not finite or too small are dropped. Diverging training is noticed by its losses.

    Args:
        anchors: of each level, (A, 4).
        logits, deltas: of each level, (N, A) and (N, A, 4).
        corners: (N, 4), width, height, width and height of each image in pixels.

    Returns:
        (N, P, 4), the best first, and which of them are real, (N, P).
    """
    scores, shifts, sources = [], [], []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        best, indices = level_logits.topk(min(level_logits.shape[1], rpn.pre_nms_topk[True]), dim=1)
        scores.append(best)
        shifts.append(rows(level_deltas, indices))
        sources.append(level_anchors[indices])
    counts = [level.shape[1] for level in scores]
    all_scores, all_shifts, all_sources = (torch.cat(parts, dim=1) for parts in (scores, shifts, sources))
    all_scores = all_scores.float()
    decoded = rpn.box2box_transform.apply_deltas(all_shifts.flatten(0, 1), all_sources.flatten(0, 1))
    all_boxes = decoded.view_as(all_sources)
    finite = all_boxes.isfinite().all(dim=2) & all_scores.isfinite()
    all_boxes = torch.minimum(all_boxes.clamp(min=0), corners[:, None])
    valid = finite & (all_boxes[..., 2:] - all_boxes[..., :2] > rpn.min_box_size).all(dim=2)
    all_boxes = torch.where(valid[..., None], all_boxes, 0)
    all_scores = torch.where(valid, all_scores, -torch.inf)
    levels = zip(all_boxes.split(counts, dim=1), all_scores.split(counts, dim=1), strict=True)
    kept = torch.cat([_kept(*level, rpn.nms_thresh) for level in levels], dim=1)
    best, indices = torch.where(kept, all_scores, -torch.inf).topk(min(rpn.post_nms_topk[True], sum(counts)), dim=1)
    return rows(all_boxes, indices), best > -torch.inf


def _kept(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each image, all images in one call: (N, K, 4) and (N, K) -> bool, (N, K).

    Boxes are offset by image, in float64, so that no box is rounded.
    """
    images, count = scores.shape
    apart = boxes.double() + (torch.arange(images, device=boxes.device) * 2.0**20)[:, None, None]
    kept = nms(apart.view(-1, 4), scores.double().flatten(), threshold)
    return scores.new_zeros(images * count, dtype=torch.bool).index_fill_(0, kept, True).view(images, count)
