"""The record of a detector's training or evaluation, and what it was expected to say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from robust_backbones.detection.step import runs_in_bfloat16
from robust_backbones.errors import TrainingFailedError
from robust_backbones.runs.record import RunRecord


def write_record(
    name: str,
    cfg: CfgNode,
    metrics: Mapping[str, float | None],
    *,
    backbone: dict[str, Any],
    threat_model: str | None,
    seconds: float,
) -> None:
    """Write the file ``name`` in OUTPUT_DIR; ``backbone`` and ``threat_model`` as in records."""
    config = yaml.safe_load(cfg.dump())
    if cfg.SOLVER.AMP.DTYPE == "bfloat16" and not runs_in_bfloat16(cfg):
        config["SOLVER"]["AMP"]["ENABLED"] = False  # what ran, which is not what was asked for on every CPU
    record = RunRecord(
        run_id=Path(cfg.OUTPUT_DIR).name,
        task="segmentation" if cfg.MODEL.MASK_ON else "detection",
        backbone=backbone,
        threat_model=threat_model,
        dataset=", ".join(cfg.DATASETS.TEST),
        metrics=dict(metrics),
        seed=cfg.SEED,
        config=config,
        seconds=seconds,
    )
    record.write(Path(cfg.OUTPUT_DIR) / name)


def check_expected(cfg: CfgNode, metrics: Mapping[str, float | None]) -> None:
    """Compare a record's metrics with TEST.EXPECTED_RESULTS: rows of task, metric, value and tolerance.

    Raises:
        TrainingFailedError: a result is another one.
    """
    for task, name, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        value = metrics.get(f"{task}/{name}")
        if value is None or abs(value - expected) > tolerance:
            raise TrainingFailedError(
                f"{task}/{name} is {value if value is None else format(value, '.2f')}, and TEST.EXPECTED_RESULTS says "
                f"{expected} ± {tolerance}: weights, data or configuration are not those that it was measured with"
            )
