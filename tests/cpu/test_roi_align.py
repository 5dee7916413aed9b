"""ROIAlign by rows against torchvision's operator."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from robust_backbones.cpu.roi_align import roi_align_by_rows

place, side = st.floats(-30, 90, width=32), st.floats(0, 90, width=32)
boxes = st.lists(st.tuples(st.integers(0, 1), place, place, side, side), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(
    found=boxes,
    output=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([0.0625, 0.25, 1.0]),
    sampling=st.sampled_from([0, 1, 3]),
    aligned=st.booleans(),
)
def test_rows_give_what_torchvision_does(
    found: list[tuple[float, ...]],
    output: tuple[int, int],
    size: tuple[int, int],
    scale: float,
    sampling: int,
    aligned: bool,
) -> None:
    """Values and gradient in float64; boxes outside and without area among them."""
    features = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    rois = torch.tensor(found, dtype=torch.float64)
    rois[:, 3:] += rois[:, 1:3]
    options: dict[str, Any] = {"spatial_scale": scale, "sampling_ratio": sampling, "aligned": aligned}
    ours = roi_align_by_rows(features, rois, output, **options) + 0 * features.sum()
    theirs = roi_align(features, rois, output, **options)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    weights = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours_back,) = torch.autograd.grad(ours, features, weights)
    (theirs_back,) = torch.autograd.grad(theirs, features, weights)
    torch.testing.assert_close(ours_back, theirs_back, rtol=0, atol=1e-9)
