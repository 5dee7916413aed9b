"""Run lengths of masks, as pycocotools encodes them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from robust_backbones.detection import run_lengths as room
from robust_backbones.detection.run_lengths import run_lengths


@given(
    arrays.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6))), st.sampled_from([1, 50])
)
def test_they_are_pycocotools(masks: np.ndarray, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_MOST_PIXELS", at_once)
        found = run_lengths(torch.from_numpy(masks))
    assert len(found) == len(masks)
    for mask, own in zip(masks, found, strict=True):
        wanted = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert own == {"size": wanted["size"], "counts": wanted["counts"].decode()}
