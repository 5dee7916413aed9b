"""Accuracy, the two ways that transfer data sets count it."""

from __future__ import annotations

from torch import Tensor

from robust_backbones.errors import check_choice

METRICS = ("top1", "mean_per_class")
"""Share of images; mean over classes of each one's share, so that small classes count as much as large ones."""


def accuracy(right: Tensor, images: Tensor, metric: str) -> float:
    """Accuracy, 0-100, from counts a class.

    Args:
        right, images: shape (classes,), right answers and all images of each class; a class without images does not
            count.
        metric: one of METRICS.
    """
    check_choice("metric", metric, METRICS)
    right, images = right.double(), images.double()
    if metric == "top1":
        return float(100 * right.sum() / images.sum())
    present = images > 0
    return float(100 * (right[present] / images[present]).mean())
