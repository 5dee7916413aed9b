"""Accuracy, in the two definitions used by transfer data sets."""

from __future__ import annotations

from torch import Tensor

from robust_backbones.errors import check_choice

METRICS = ("top1", "mean_per_class")
"""Top-1 over images; mean over classes, so that small classes count as much as large ones."""


def accuracy(right: Tensor, images: Tensor, metric: str) -> float:
    """Accuracy, 0-100, from counts per class.

    Args:
        right, images: shape (classes,), correct predictions and all images of each class; a class without images does
            not count.
        metric: one of METRICS.
    """
    check_choice("metric", metric, METRICS)
    right, images = right.double(), images.double()
    if metric == "top1":
        return float(100 * right.sum() / images.sum())
    present = images > 0
    return float(100 * (right[present] / images[present]).mean())
