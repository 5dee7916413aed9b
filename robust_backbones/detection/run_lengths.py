"""Encodes masks as COCO's run lengths, on the device of the masks.

Detectron2 copies up to a hundred full-size masks per image to the CPU, where pycocotools reads every pixel. Here the
device finds the positions where a mask changes, and only these are copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

_MOST_PIXELS = 2**27
"""Number of pixels processed at once: copies of this many are in memory."""


def run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """The masks, bool (N, H, W), as ``segmentation`` of COCO's result format: equal to pycocotools' ``encode``."""
    count, height, width = masks.shape
    at_once = max(1, _MOST_PIXELS // max(1, height * width))
    return [found for part in masks.split(at_once) for found in _of_part(part)] if count else []


def _of_part(masks: Tensor) -> list[dict[str, Any]]:
    count, height, width = masks.shape
    columns = F.pad(masks.transpose(1, 2).flatten(1), (1, 0))  # COCO's runs go down the columns and begin with zeros
    mask, place = (columns[:, 1:] != columns[:, :-1]).nonzero().cpu().numpy().T
    found = []
    for changes in np.split(place, np.searchsorted(mask, np.arange(1, count))):
        lengths = np.diff(changes, prepend=0, append=height * width)
        encoded = coco_mask.frPyObjects({"size": [height, width], "counts": lengths.tolist()}, height, width)
        found.append({"size": encoded["size"], "counts": encoded["counts"].decode()})
    return found
