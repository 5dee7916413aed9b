"""Training of Faster R-CNN on small images, from files to updates: ours against Detectron2's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.detectors import CONFIG, random_detector, trainer_step
from benchmarks.turns import Side, Way
from benchmarks.work import Work

FILE = CONFIG.parents[1] / "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"
DETECTRON2, OURS, FAST = "Detectron2's AMP, bf16", "ours, bf16", "ours, MODEL.FAST_STEP, bf16"
COMPILED = "ours, MODEL.FAST_STEP and COMPILE, bf16"


@dataclass(frozen=True, kw_only=True)
class DetectorTraining(Work):
    """An iteration of Faster R-CNN R50-FPN, its batch read from files by worker processes."""

    name: ClassVar[str] = "detector-training"
    title: ClassVar[str] = "Faster R-CNN R50-FPN on VOC at 192 px, loading included"
    on_gpu: ClassVar[bool] = True

    voc: Path
    """A folder like VOC2007."""
    short_side: int = 192
    batch_size: int = 16
    workers: int = 0
    """0: 12 on a GPU, 2 on a CPU."""

    def ways(self) -> list[Way]:
        workers = self.workers or (12 if self.device == "cuda" else 2)
        shared = {"voc": str(self.voc), "short_side": self.short_side, "batch_size": self.batch_size}
        shared["workers"] = workers
        kinds = {DETECTRON2: {"ours": False}, OURS: {}, FAST: {"fast_step": True}}
        if self.device == "cuda":
            kinds[COMPILED] = {"fast_step": True, "compiled": True}
        return [Way(name, "detector_training:iteration", {**shared, **kind}) for name, kind in kinds.items()]

    @property
    def remark(self) -> str:
        return (
            f"Batches of {self.batch_size} photographs, random weights, the stem and the first stage frozen. That the "
            "steps' losses are equal is tested elsewhere. To be reached on a GPU of the Hopper class: 40 iterations a "
            "second."
        )

    @property
    def units(self) -> tuple[int, str]:
        return 1, "iteration"


def iteration(
    *,
    voc: str,
    short_side: int,
    batch_size: int,
    workers: int,
    device: str,
    ours: bool = True,
    fast_step: bool = False,
    compiled: bool = False,
) -> Side:
    overrides: list[Any] = [
        *("DATASETS.VOC_FORMAT", (("photographs", voc, "trainval"),), "DATASETS.TRAIN", ("photographs",)),
        *("INPUT.MIN_SIZE_TRAIN", (short_side,), "INPUT.MAX_SIZE_TRAIN", 2 * short_side),
        *("SOLVER.IMS_PER_BATCH", batch_size, "DATALOADER.NUM_WORKERS", workers),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "MODEL.FAST_STEP", fast_step),
        *("MODEL.COMPILE", compiled),
    ]
    cfg, model, _ = random_detector(
        (32, 32), images=1, device=device, config=FILE, fast_roi_align=True if ours else None, overrides=overrides
    )
    from detectron2.data import build_detection_train_loader

    from robust_backbones.detection.data_stream import TrainingStream
    from robust_backbones.detection.datasets import register_datasets

    register_datasets(cfg)
    batches = TrainingStream(cfg) if ours else build_detection_train_loader(cfg)
    step = trainer_step(cfg, model, batches)
    for _ in range(100 if compiled else 0):  # every shape is compiled before a turn counts
        step()
    return Side(step)
