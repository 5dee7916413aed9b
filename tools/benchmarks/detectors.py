"""Mask R-CNN R50-FPN with random weights, and batches for it: what a step costs depends on neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import TOOLS

CONFIG = TOOLS.parent / "detectron_configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def random_detector(
    size: tuple[int, int],
    *,
    images: int,
    device: str,
    config: Path | Sequence[Path] = CONFIG,
    fast_roi_align: bool | None = True,
    overrides: Sequence[object] = (),
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """(Configuration, model in training mode, samples of three objects each), the same at every call.

    ``fast_roi_align`` is MODEL.FAST_ROI_ALIGN; with None the model is as Detectron2 builds it.
    """
    import robust_backbones.detection  # noqa: F401  # first: it says so when Detectron2 is missing

    # isort: split
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances

    from robust_backbones.detection.config import load_config
    from robust_backbones.detection.trainer import Trainer

    cfg = load_config(config, ["MODEL.DEVICE", device, "MODEL.FAST_ROI_ALIGN", bool(fast_roi_align), *overrides])
    torch.manual_seed(0)
    model = (build_model(cfg) if fast_roi_align is None else Trainer.build_model(cfg)).train()
    height, width = size
    shares = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9], [0.2, 0.6, 0.4, 0.8]])
    boxes = shares * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(3), gt_masks=BitMasks(masks))
    samples = [
        {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), "instances": instances}
        for _ in range(images)
    ]
    return cfg, model, samples


def trainer_step(cfg: Any, model: Any, batches: Iterable[list[dict[str, Any]]]) -> Callable[[], None]:
    """A step of the trainer that ``cfg`` asks for, on the next batch; its metrics and its update are part of it."""
    from detectron2.utils.events import EventStorage

    from robust_backbones.detection.trainer import build_steps

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)  # random weights must not move far
    trainer = build_steps(cfg, model, batches, optimizer)

    def step() -> None:
        with arithmetic(cfg), EventStorage(trainer.iter):
            trainer.run_step()
        trainer.iter += 1

    return step


def arithmetic(cfg: Any) -> torch.autocast:
    return torch.autocast(cfg.MODEL.DEVICE, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED)
