"""Detectron2's DefaultTrainer with the checkpoint guard, bfloat16, our evaluators and a record at the end."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model

from robust_backbones.convert import BackboneMetadata
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.errors import InputError
from robust_backbones.records import RunRecord


class CocoEvaluator(COCOEvaluator):
    """COCO's evaluator, for which a detector that finds nothing has AP 0; Detectron2's says "not a number"."""

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        results: dict[str, float] = super()._derive_coco_results(coco_eval, iou_type, class_names)
        return results if coco_eval is not None else results | {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


class Trainer(DefaultTrainer):
    """Trains and evaluates one detector; ``results`` holds the last evaluation, by task and metric."""

    checkpointer: BackboneCheckpointer

    def __init__(self, cfg: CfgNode) -> None:
        self._bfloat16 = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16"
        if self._bfloat16:
            # DefaultTrainer's own AMP is float16 with loss scaling, for CUDA alone.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        # DefaultTrainer offers no place to choose the checkpointer; this is the last call before it is used.
        self.checkpointer = BackboneCheckpointer(
            self._trainer.model, self.cfg.OUTPUT_DIR, cfg=self.cfg, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    def run_step(self) -> None:
        # Only convolutions and matrix products run in bfloat16: losses, gradients' sums and the update do not.
        with torch.autocast(torch.device(self.cfg.MODEL.DEVICE).type, torch.bfloat16, enabled=self._bfloat16):
            super().run_step()

    @property
    def results(self) -> dict[str, Any]:
        return getattr(self, "_last_eval_results", {})

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            return CocoEvaluator(dataset_name, tasks, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise InputError(f"no evaluator for {dataset_name} of kind {kind}: choose a COCO- or VOC-format data set")


def check_weights(cfg: CfgNode, *, whole_detector: bool) -> None:
    """Load MODEL.WEIGHTS into a detector that is thrown away: a wrong file stops the run before anything is written.

    Takes seconds, and in the first process alone: no worker of a multi-GPU launch has to fail for it.

    Raises:
        InputError: what the checkpoint guard has to say.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    BackboneCheckpointer(build_model(cfg), cfg=cfg, whole_detector=whole_detector).load(cfg.MODEL.WEIGHTS)


def train(cfg: CfgNode, *, resume: bool) -> RunRecord:
    """Train from MODEL.WEIGHTS (or the last checkpoint), evaluate, and write record.json to OUTPUT_DIR."""
    start = time.perf_counter()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    seconds = time.perf_counter() - start
    return _record(cfg, trainer.results, trainer.checkpointer.metadata, seconds, "record.json")


def evaluate(cfg: CfgNode) -> RunRecord:
    """Evaluate the detector in MODEL.WEIGHTS and write eval_record.json to OUTPUT_DIR."""
    start = time.perf_counter()
    model = Trainer.build_model(cfg)
    checkpointer = BackboneCheckpointer(model, cfg=cfg, whole_detector=True)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    results = Trainer.test(cfg, model)
    return _record(cfg, results, checkpointer.metadata, time.perf_counter() - start, "eval_record.json")


def _record(
    cfg: CfgNode, results: Mapping[str, Any], metadata: BackboneMetadata | None, seconds: float, name: str
) -> RunRecord:
    backbone: dict[str, Any] = {}
    if metadata is not None:
        backbone = {**metadata.spec.to_dict(), "source": metadata.source, "source_sha256": metadata.source_sha256}
    record = RunRecord(
        run_id=Path(cfg.OUTPUT_DIR).name,
        task="segmentation" if cfg.MODEL.MASK_ON else "detection",
        backbone=backbone,
        threat_model=metadata.threat_model if metadata else None,
        dataset=", ".join(cfg.DATASETS.TEST),
        metrics=flat_metrics(results),
        seed=cfg.SEED,
        config=yaml.safe_load(cfg.dump()),
        seconds=seconds,
    )
    if comm.is_main_process():  # the others hold no results
        record.write(Path(cfg.OUTPUT_DIR) / name)
    return record


def flat_metrics(results: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """``{"bbox": {"AP": 40.1}}`` -> ``{"bbox/AP": 40.1}``; what is not defined (no object of a size) is None."""
    flat: dict[str, float | None] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = float(value) if math.isfinite(value) else None
    return flat
