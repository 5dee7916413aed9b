"""Which values the keys of a detector's configuration may have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from PIL import Image
from PIL.ImageMode import getmode

from robust_backbones.errors import InputError

_Rule = tuple[Callable[[Any], object], str]
"""Whether a value is valid, and what an error says of one that is not."""


def _is_device(name: str) -> bool:
    try:
        return bool(torch.device(name))
    except RuntimeError:
        return False


def _all_positive(numbers: Any) -> bool:
    """Whether nested lists hold positive numbers alone, and none but the outer one is empty."""
    return all((row and _all_positive(row)) if isinstance(row, list) else 0 < row < math.inf for row in numbers)


_SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
_HEADS = ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD", "MODEL.RETINANET")
_VALID: dict[str, _Rule] = {
    **dict.fromkeys(
        ("DATASETS.TRAIN", "DATASETS.TEST"),
        (lambda names: not isinstance(names, str), "is one text, not a tuple: give (NAME,), with a comma"),
    ),
    "DATASETS.HELD_OUT": (lambda count: count >= 0, "is no number of images: give 0 for none"),
    "DATALOADER.NUM_WORKERS": (lambda count: count >= 0, "is no number of processes: give 0 or more"),
    **dict.fromkeys(
        ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST"),
        (
            lambda sides: min([sides] if isinstance(sides, int) else sides, default=-1) >= 0,
            "are no sides of images: give 1 or more, or 0 for images as they are",
        ),
    ),
    **dict.fromkeys(
        ("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST"),
        (lambda side: side >= 1, "is no side of an image: give 1 or more"),
    ),
    "INPUT.MASK_FORMAT": (("polygon", "bitmask").__contains__, "is not one of polygon, bitmask"),
    "INPUT.SCALE_JITTER": (
        lambda given: not given or (len(given) == 3 and 0 < given[0] <= given[1] and given[2] >= 1),
        "is no (least scale, greatest scale, pixels): give () for none",
    ),
    **dict.fromkeys(
        (
            *(f"{head}.BATCH_SIZE_PER_IMAGE" for head in _HEADS[:2]),
            *(f"MODEL.RPN.{when}_NMS_TOPK_{part}" for when in ("PRE", "POST") for part in ("TRAIN", "TEST")),
            *(f"MODEL.ROI_BOX_HEAD.{name}" for name in ("FC_DIM", "CONV_DIM", "POOLER_RESOLUTION")),
            *(f"MODEL.ROI_MASK_HEAD.{name}" for name in ("CONV_DIM", "POOLER_RESOLUTION")),
        ),
        (lambda count: count >= 1, "is too small: give 1 or more"),
    ),
    "MODEL.RPN.CONV_DIMS": (
        lambda dims: all(dim == -1 or dim >= 1 for dim in dims),
        "are no numbers of channels: give 1 or more, or -1",
    ),
    **dict.fromkeys(
        [f"{head}.BBOX_REG_LOSS_TYPE" for head in _HEADS if head != "MODEL.ROI_HEADS"],
        (("smooth_l1", "giou", "diou", "ciou").__contains__, "is not one of smooth_l1, giou, diou, ciou"),
    ),
    **dict.fromkeys(
        [f"{head}.BBOX_REG_WEIGHTS" for head in _HEADS if head != "MODEL.ROI_HEADS"],
        (
            lambda weights: len(weights) in (4, 5) and _all_positive(weights),
            "are no weights of boxes: give four positive numbers",
        ),
    ),
    **dict.fromkeys(
        [f"{head}.IOU_THRESHOLDS" for head in _HEADS if head != "MODEL.ROI_BOX_HEAD"],
        (lambda ious: all(0 <= iou <= 1 for iou in ious), "are no IoUs: give numbers from 0.0 to 1.0"),
    ),
    **dict.fromkeys(
        ("MODEL.RPN.NMS_THRESH", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "MODEL.RETINANET.NMS_THRESH_TEST"),
        (lambda iou: 0 <= iou <= 1, "is no IoU: give a number from 0.0 to 1.0"),
    ),
    **dict.fromkeys(
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.RETINANET.SCORE_THRESH_TEST"),
        (lambda score: score <= 1, "is above every score: give a number up to 1.0"),
    ),
    **dict.fromkeys(
        [f"{head}.POSITIVE_FRACTION" for head in _HEADS[:2]],
        (lambda share: 0 <= share <= 1, "is no fraction: give 0.0 to 1.0"),
    ),
    **dict.fromkeys(
        ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "MODEL.PIXEL_STD"),
        (_all_positive, "are not all positive: give positive numbers, one or more in each list"),
    ),
    "MODEL.DEVICE": (_is_device, "is no device: give cpu, cuda or cuda:NUMBER"),
    "MODEL.FPN.OUT_CHANNELS": (lambda count: count >= 1, "is no number of channels: give 1 or more"),
    "MODEL.BACKBONE.DROP_PATH": (lambda rate: 0 <= rate < 1, "is not in [0, 1): give 0.0 for none"),
    "MODEL.SWIN.WINDOW_SIZE": (lambda side: side == 0 or side >= 2, "is no side of a window: give 2 or more, or 0"),
    "SOLVER.LR_SCHEDULER_NAME": (_SCHEDULES.__contains__, f"is not one of {', '.join(_SCHEDULES)}"),
    "SOLVER.WARMUP_METHOD": (("constant", "linear").__contains__, "is not one of constant, linear"),
    **dict.fromkeys(
        ("SOLVER.WEIGHT_DECAY", "SOLVER.BIAS_LR_FACTOR"),
        (lambda factor: 0 <= factor < math.inf, "is no factor: give 0.0 or more"),
    ),
    **dict.fromkeys(
        ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"),
        (
            lambda decay: decay is None or 0 <= decay < math.inf,
            "is no factor: give 0.0 or more, or null (None in a command) for the same",
        ),
    ),
    "SOLVER.BASE_LR": (lambda rate: 0 <= rate < math.inf, "is no learning rate: give 0.0 or more"),
    "SOLVER.AMP.DTYPE": (("float16", "bfloat16").__contains__, "is not one of float16, bfloat16"),
    "SOLVER.IMS_PER_BATCH": (lambda count: count >= 1, "is no number of images: give 1 or more"),
    "SOLVER.CHECKPOINT_PERIOD": (lambda count: count >= 1, "is no number of iterations: give 1 or more"),
    "SOLVER.EMA_DECAY": (lambda decay: 0 <= decay < 1, "is not in [0, 1): give 0.0 for none"),
    "SOLVER.OPTIMIZER": (("SGD", "AdamW").__contains__, "is not one of SGD, AdamW"),
    "SOLVER.BACKBONE_MULTIPLIER": (
        lambda factor: 0 <= factor < math.inf,
        "is no factor of a learning rate: give 1.0 for the same as the rest's",
    ),
    "SOLVER.LAYER_DECAY": (lambda factor: 0 < factor <= 1, "is not in (0, 1]: give 1.0 for none"),
    "ADVERSARIAL.KIND": (("", "free", "pgd").__contains__, 'is not one of free, pgd: give "" for none'),
    "ADVERSARIAL.REPLAYS": (lambda count: count >= 1, "is no number of updates a batch: give 1 or more"),
    "TEST.VISUALIZE": (lambda count: count >= 0, "is no number of images: give 0 for none"),
    "TEST.MAX_DETS": (
        lambda counts: counts and all(isinstance(n, int) and n > 0 for n in counts) and [*counts] == sorted({*counts}),
        "are no rising numbers of detections: give (1, 10, 100)",
    ),
    # One that no evaluation has would stop the run at its first evaluation, maybe the last thing that it does.
    "TEST.BEST_METRIC": (
        re.compile(r"((.+/)?(segm|bbox|bbox-area|bbox-11point)/(AP(50|75|[sml]|-.+)?|AR(\d+|[sml])))?").fullmatch,
        "is no metric: give one like bbox/AP50",
    ),
    # Each process adds its rank to it.
    "SEED": (lambda seed: seed < 2**32 - 2**16, "is no seed of NumPy's: give a number below 4 billion"),
}
"""Valid values of our keys, and of those of Detectron2's at which it fails in the first step, or trains on something
else than was meant; and the message for other values."""

_USED_WITH = {
    "MODEL.ROI_BOX_HEAD.FC_DIM": "MODEL.ROI_BOX_HEAD.NUM_FC",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "MODEL.MASK_ON",
}
"""Keys that may have any value where another one is 0 or False."""
_CROPS: dict[str, _Rule] = {
    "relative_range": (
        lambda size: len(size) <= 2 and all(0 <= side <= 1 for side in size),
        "the least share of each side, such as [0.9, 0.9]",
    ),
    "relative": (
        lambda size: len(size) == 2 and all(0 < side <= 1 for side in size),
        "a share of each side, such as [0.9, 0.9]",
    ),
    "absolute": (
        lambda size: len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size),
        "both sides in pixels, such as [384, 600]",
    ),
    "absolute_range": (
        lambda size: len(size) == 2 and 1 <= size[0] <= size[1],
        "the least and the greatest side in pixels, such as [384, 600]",
    ),
}
"""INPUT.CROP.TYPE -> valid values of INPUT.CROP.SIZE."""


def check_values(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    """Raise InputError for the first value that its key may not have.

    Args:
        values: of all keys, as ``flat(cfg)`` gives them.
    """
    means = len(cfg.MODEL.PIXEL_MEAN)
    rules: dict[str, _Rule] = {
        "INPUT.FORMAT": (
            lambda order: order == "BGR" or (order in Image.MODES and len(getmode(order).bands) in (1, means)),
            f"is no order of the {means} channels of MODEL.PIXEL_MEAN: give RGB or BGR",
        )
    }
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE in _CROPS:
        is_valid, what = _CROPS[cfg.INPUT.CROP.TYPE]
        rules["INPUT.CROP.SIZE"] = (is_valid, f"is not what INPUT.CROP.TYPE {cfg.INPUT.CROP.TYPE} wants: give {what}")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not isinstance(cfg.INPUT.MIN_SIZE_TRAIN, int):
        rising = "do not rise, as INPUT.MIN_SIZE_TRAIN_SAMPLING range wants: give (least, greatest)"
        rules["INPUT.MIN_SIZE_TRAIN"] = (lambda sides: len(sides) != 2 or sides[0] <= sides[1], rising)
    for key, (is_valid, mend) in [*_VALID.items(), *rules.items()]:
        if key in _USED_WITH and not values[_USED_WITH[key]]:
            continue
        try:
            holds = is_valid(values[key])
        except TypeError:  # of another kind, as null
            holds = False
        if not holds:
            raise InputError(f"{key} {values[key]!r} {mend}")
