"""Box and mask AP of a trained detector."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import detectron2.utils.comm as comm
from detectron2.config import CfgNode

from robust_backbones.detection.collapse import merged
from robust_backbones.detection.config import check_config
from robust_backbones.detection.data_stream import undisturbed
from robust_backbones.detection.datasets import annotation_digests, check_datasets, counted, register_datasets
from robust_backbones.detection.hooks import measure
from robust_backbones.detection.predictor import load_detector, read_run
from robust_backbones.detection.run_folder import keep_other_record, write_record
from robust_backbones.detection.trainer import Trainer

NAME = "eval_record.json"


@undisturbed()
def evaluate(
    detector: CfgNode | str | Path,
    weights: str | Path | None = None,
    *,
    checked: bool = False,
    data_warnings: Mapping[str, dict[str, int]] | None = None,
) -> dict[str, float | None]:
    """Evaluate a trained detector on DATASETS.TEST, and write eval_record.json and the detections to OUTPUT_DIR.

    An existing eval_record.json of other weights or settings is kept as eval_record_1.json, or the next free number.

    Args:
        detector: The OUTPUT_DIR of a training run, a .pth file in one, or a configuration.
        weights: The .pth file; by default the run's model_final.pth, or MODEL.WEIGHTS of a configuration.
        checked: The caller has checked the data sets.
        data_warnings: The counts of the caller's check, for the record.

    Returns:
        Metrics such as ``bbox/AP``, 0 to 100, None if undefined; empty in all processes but the first.

    Raises:
        InputError: the weights are not a complete detector of this configuration, or as in ``Trainer``.
    """
    start = time.perf_counter()
    if isinstance(detector, str | Path):
        cfg, found = read_run(detector)
    else:
        cfg, found = detector, detector.MODEL.WEIGHTS
    check_config(cfg)
    register_datasets(cfg)
    if not checked:
        data_warnings = counted(check_datasets(cfg, eval_only=True))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights or found)
    cfg.DATASETS.CONTENT = annotation_digests(cfg.DATASETS.TEST)
    cfg.freeze()
    trained = load_detector(cfg, cfg.MODEL.WEIGHTS)
    trained.match_classes(cfg.DATASETS.TEST)
    metrics, oddities = measure(Trainer, cfg, trained.model, Path(cfg.MODEL.WEIGHTS).parent)
    if comm.is_main_process():
        keep_other_record(NAME, cfg)
        write_record(
            NAME,
            cfg,
            metrics,
            backbone=trained.backbone,
            threat_model=trained.threat_model,
            seconds=time.perf_counter() - start,
            data_warnings=merged(data_warnings or {}, oddities),
        )
    return metrics
