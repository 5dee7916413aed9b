"""Matching of boxes and objects (Ren et al. 2015, section 3.1.2): IoU, matching and sampling for a whole batch.

N images have M objects each, as many as the image with the most objects; ``exists`` says which are real.
"""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of (..., M, 4) and (..., A, 4), rows (left, top, right, bottom): (..., M, A)."""
    left, top, right, bottom = boxes[..., None].unbind(-2)
    other_left, other_top, other_right, other_bottom = others[..., None, :, :].unbind(-1)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp_(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp_(min=0)
    common = width.mul_(height)
    union = (right - left) * (bottom - top) + (other_right - other_left) * (other_bottom - other_top) - common
    return torch.where(common > 0, common / union, 0)


def match(overlaps: Tensor, exists: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """The result of Detectron2's ``matcher`` for each image of a batch.

    Args:
        overlaps: (N, M, A), of objects and boxes.
        exists: (N, M).

    Returns:
        The object of each box and the box's label, one of ``matcher.labels``; both (N, A).
    """
    overlaps = overlaps.masked_fill(~exists[..., None], -1)
    best, objects = overlaps.max(dim=1)
    labels = torch.full_like(objects, matcher.labels[0])
    for threshold, label in zip(matcher.thresholds[1:-1], matcher.labels[1:], strict=True):
        labels = torch.where(best >= threshold, label, labels)
    if matcher.allow_low_quality_matches:  # the boxes that overlap an object most are its own, however little that is
        closest = (overlaps == overlaps.amax(dim=2, keepdim=True)) & exists[..., None]
        labels = torch.where(closest.any(dim=1), 1, labels)
    return objects, labels


def sample(
    positive: Tensor, negative: Tensor, *, size: int, positive_fraction: float, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample ``size`` boxes of each image: at most the fraction of positives, then negatives; by the largest keys.

    Args:
        positive, negative: (N, A).
        keys: (N, A), in [0, 1); random, for a random sample.

    Returns:
        Indices (N, min(size, A)), positives first, and which of them count: an image may have too few boxes.
    """
    boxes, most = keys.shape[1], int(size * positive_fraction)
    if most < boxes:
        positive = positive & (keys > torch.where(positive, keys, -1).topk(most + 1).values[:, -1:])
    order = torch.where(positive, keys + 1, torch.where(negative, keys, -1))
    values, indices = order.topk(min(size, boxes))
    return indices, values >= 0


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """(N, A, C) and (N, K) -> (N, K, C): the rows of each image with these indices."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[2]))
