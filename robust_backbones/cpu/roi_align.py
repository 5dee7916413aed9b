"""ROIAlign (He et al. 2017, "Mask R-CNN", section 3), implemented to be faster on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_align_by_rows(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """torchvision's ``roi_align``, up to rounding, as weighted sums over rows of a table.

    The table has a row of C channels for each pixel. A bin is the mean of its samples and a sample a mean of four
    pixels, so a bin is one weighted bag of rows: memory is read and written row by row, while torchvision's operator
    goes through the pixels of one channel after the other.

    Args:
        features: (N, C, H, W).
        rois: (R, 5), of the features' type: image, left, top, right, bottom, in image pixels; multiplied by
            ``spatial_scale`` they are pixels of the features.
        sampling_ratio: samples of a bin along each axis; 0 for about one per pixel.
        aligned: pixel centres are at half-integers, as in Detectron2.

    Returns:
        (R, C, *output_size), channels last.
    """
    count, channels, height, width = features.shape
    bins_down, bins_right = output_size
    table = features.permute(0, 2, 3, 1).reshape(count * height * width, channels)
    offset = 0.5 if aligned else 0.0
    starts = rois[:, 1:3] * spatial_scale - offset
    sizes = rois[:, 3:5] * spatial_scale - offset - starts
    if not aligned:
        sizes = sizes.clamp(min=1)
    bin_sizes = sizes / sizes.new_tensor([bins_right, bins_down])
    samples = (bin_sizes.ceil().clamp(min=0) if sampling_ratio <= 0 else torch.full_like(sizes, sampling_ratio)).long()
    bags, order = [], []
    for right, down in samples.unique(dim=0).tolist():  # boxes with as many samples are alike
        chosen = (samples == samples.new_tensor([right, down])).all(dim=1).nonzero()[:, 0]
        order.append(chosen)
        if right == 0 or down == 0:  # boxes without area
            bags.append(table.new_zeros(len(chosen) * bins_down * bins_right, channels))
            continue
        columns, across = _pixels(starts[chosen, 0], bin_sizes[chosen, 0], bins_right, right, width)
        rows, along = _pixels(starts[chosen, 1], bin_sizes[chosen, 1], bins_down, down, height)
        rows = rows + (rois[chosen, 0].long() * height)[:, None, None]
        places = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
        weights = along[:, :, None, :, None] * across[:, None, :, None, :]
        bag = 4 * down * right
        bags.append(F.embedding_bag(places.view(-1, bag), table, per_sample_weights=weights.view(-1, bag), mode="sum"))
    pooled = torch.cat(bags).view(len(rois), bins_down, bins_right, channels)
    return pooled[torch.cat(order).argsort()].permute(0, 3, 1, 2)


def _pixels(starts: Tensor, bin_sizes: Tensor, bins: int, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the two pixels beside each sample of each bin, and their weights: both (R, bins, 2 * samples)."""
    within = (torch.arange(samples, dtype=starts.dtype) + 0.5) / samples
    steps = torch.arange(bins, dtype=starts.dtype)[:, None] + within
    places = starts[:, None, None] + bin_sizes[:, None, None] * steps
    seen = (places >= -1) & (places <= length)
    places = places.clamp(0, length - 1)
    lower = places.floor()
    share = places - lower
    pixels = torch.cat([lower, (lower + 1).clamp(max=length - 1)], dim=2).long()
    return pixels, torch.cat([1 - share, share], dim=2) * (seen.to(share.dtype) / samples).repeat(1, 1, 2)
