"""The folder of a detector's run: its owner, the configuration at its start, and the record at its end."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from robust_backbones.checkpoint.untrusted import read_file
from robust_backbones.classification.compute import arithmetic
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.detection.checkpoint import newest_checkpoint
from robust_backbones.detection.datasets import annotation_digests
from robust_backbones.errors import InputError, TrainingFailedError, plural
from robust_backbones.runs.files import write_text
from robust_backbones.runs.folders import began
from robust_backbones.runs.identity import DIGESTS, check_same, differences, read_settings
from robust_backbones.runs.record import RunRecord


def check_folder(cfg: CfgNode, *, resume: bool, extend: bool = False) -> bool:
    """Whether the run of ``cfg`` has already finished in its OUTPUT_DIR; an unset SEED is taken from the run there.

    DATASETS.CONTENT becomes that of the files; a folder of before it was noted may be of any.

    Args:
        extend: SOLVER.MAX_ITER may be larger than in the run there, and SOLVER.STEPS different: ``cfg`` then notes in
            SOLVER.EXTENDED which schedule is left, and when.

    Raises:
        InputError: the folder holds another run, or this one without ``resume``.
    """
    folder = Path(cfg.OUTPUT_DIR)
    path = folder / "config.yaml"
    cfg.DATASETS.CONTENT = annotation_digests((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if not path.exists() or not began(folder):
        if began(folder):
            raise InputError(f"{folder} is not empty and holds no detector's run of ours: give another OUTPUT_DIR")
        if extend:
            raise InputError(f"{folder} holds no run to extend: check OUTPUT_DIR, or leave out --extend")
        return False
    held = read_settings(path)
    if (conversion := _conversion(cfg.MODEL.WEIGHTS)) and conversion == _conversion(held.get("MODEL.WEIGHTS", "")):
        held["MODEL.WEIGHTS"] = cfg.MODEL.WEIGHTS
    content, before = dict(cfg.DATASETS.CONTENT), dict(held.get(DIGESTS, ()))
    if other := [name for name in content if before.get(name, content[name]) != content[name]]:
        raise InputError(
            f"{folder} holds a run on other annotations of {', '.join(other)}: choose another output folder, or put "
            "back the files that it began with"
        )
    cfg.SOLVER.EXTENDED = held.get("SOLVER.EXTENDED", ())
    if not cfg.DATASETS.SKIPPED:  # the list of the first start holds for the whole run
        cfg.DATASETS.SKIPPED = held.get("DATASETS.SKIPPED", ())
    if cfg.SEED < 0:
        cfg.SEED = held.get("SEED", cfg.SEED)
    changed = {*differences(held, cfg, DETECTOR_KEYS)}
    longer = changed <= {"SOLVER.MAX_ITER", "SOLVER.STEPS"} and held["SOLVER.MAX_ITER"] < cfg.SOLVER.MAX_ITER
    if longer and not extend:
        raise InputError(
            f"{folder} holds this run, planned for {plural(held['SOLVER.MAX_ITER'], 'iteration')}: train "
            f"{cfg.SOLVER.MAX_ITER} by their own schedule in another OUTPUT_DIR, which alone compares with other runs, "
            "or give --resume --extend to continue this one with that schedule, which the record then says"
        )
    if longer:
        _extend(cfg, held)
    else:
        check_same(folder, held, cfg, DETECTOR_KEYS)
    if not resume:
        raise InputError(f"{folder} holds this run already: give --resume to continue it, or another OUTPUT_DIR")
    return not longer and (folder / "record.json").exists()


def _conversion(weights: str) -> tuple[str, ...]:
    """A study's conversion, identified by its folder name with the weights' hash, wherever the study is now."""
    path = Path(weights)
    return path.parts[-2:] if re.fullmatch(r"convert-.+-[0-9a-f]{10}", path.parent.name) else ()


def _extend(cfg: CfgNode, held: Mapping[str, Any]) -> None:
    """Note in ``cfg`` the schedule of ``held``, the settings in its folder, and the iteration at which it is left."""
    newest = newest_checkpoint(Path(cfg.OUTPUT_DIR))
    if cfg.SOLVER.EMA_DECAY > 0 and newest and newest.name == "model_final.pth":
        raise InputError(f"{newest} holds averaged weights alone, from which no training continues: train anew")
    done = read_file(newest)["trainer"]["iteration"] + 1 if newest else 0
    row = (done, held["SOLVER.MAX_ITER"], held["SOLVER.STEPS"])
    cfg.SOLVER.EXTENDED = (*cfg.SOLVER.EXTENDED, row)


def write_config(cfg: CfgNode) -> None:
    """Make OUTPUT_DIR the folder of this run, in the first process.

    The record of a shorter run that this one extends becomes ``record_MAX_ITER.json``.
    """
    if comm.is_main_process():
        path = Path(cfg.OUTPUT_DIR) / "record.json"
        if cfg.SOLVER.EXTENDED and path.exists():
            before = RunRecord.read(path).config["SOLVER"]["MAX_ITER"]
            if before < cfg.SOLVER.MAX_ITER:
                path.rename(path.with_stem(f"record_{before}"))
        write_text(path.with_name("config.yaml"), cfg.dump())


def seed_processes(cfg: CfgNode) -> None:
    """Seed each process with SEED and its rank, after drawing SEED if it is not set; every process calls it."""
    if cfg.SEED < 0:
        cfg.SEED = comm.all_gather(secrets.randbelow(2**31))[0]
    seed_all_rng(cfg.SEED + comm.get_rank())


def set_up(cfg: CfgNode, *, training: bool) -> CfgNode:
    """Log to OUTPUT_DIR, make it the folder of a training run, and seed each process with SEED and its rank.

    Every process calls it. The returned configuration is frozen, and has the drawn seed if none was set.
    """
    folder, rank, size = Path(cfg.OUTPUT_DIR), comm.get_rank(), comm.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    setup_logger(str(folder), distributed_rank=rank, name="fvcore")
    setup_logger(str(folder), distributed_rank=rank, name="robust_backbones")
    logger = setup_logger(str(folder), distributed_rank=rank)

    cfg = cfg.clone()
    cfg.defrost()
    seed_processes(cfg)
    cfg.freeze()
    if training:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        write_config(cfg)
        batch = cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            f"batch {batch} (processes: {size}, images each: {batch // size}), learning rate {cfg.SOLVER.BASE_LR:g}, "
            f"{plural(cfg.SOLVER.MAX_ITER, 'iteration')}, seed {cfg.SEED}"
        )
        for done, iterations, steps in cfg.SOLVER.EXTENDED:
            logger.info(f"the run was extended at iteration {done} of {iterations}; SOLVER.STEPS until then: {steps}")
    logger.info("Environment info:\n" + collect_env_info())
    logger.info("Running with full config:\n" + cfg.dump())
    return cfg


def runs_in_bfloat16(cfg: CfgNode) -> bool:
    """Whether bfloat16 is requested, and this device multiplies in it no slower than in float32."""
    wanted = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16"
    return wanted and arithmetic("bf16", torch.device(cfg.MODEL.DEVICE)) == torch.bfloat16


def keep_other_record(name: str, cfg: CfgNode) -> None:
    """Rename a record ``name`` of other settings than ``cfg`` in OUTPUT_DIR, with the next number after its stem."""
    path = Path(cfg.OUTPUT_DIR) / name
    # Seeds decide nothing in an evaluation.
    if path.exists() and {*differences(RunRecord.read(path).config, cfg, DETECTOR_KEYS)} - {"SEED"}:
        places = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(1))
        kept = next(place for place in places if not place.exists())
        path.rename(kept)
        logging.getLogger(__name__).warning(f"{path} was of other weights or settings, and is now {kept}")


def write_record(
    name: str,
    cfg: CfgNode,
    metrics: Mapping[str, float | None],
    *,
    backbone: dict[str, Any],
    threat_model: str | None,
    seconds: float,
    data_warnings: Mapping[str, dict[str, int]],
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
        dataset=", ".join(cfg.DATASETS.TEST or cfg.DATASETS.TRAIN),
        metrics=dict(metrics),
        seed=cfg.SEED,
        config=config,
        seconds=seconds,
        data_warnings=dict(data_warnings),
    )
    record.write(Path(cfg.OUTPUT_DIR) / name)


def check_expected(cfg: CfgNode, metrics: Mapping[str, float | None]) -> None:
    """Raise TrainingFailedError if a metric is not as in TEST.EXPECTED_RESULTS (task, metric, value, tolerance)."""
    for task, name, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        value = metrics.get(f"{task}/{name}")
        if value is None or abs(value - expected) > tolerance:
            raise TrainingFailedError(
                f"{task}/{name} is {value if value is None else format(value, '.2f')}, and TEST.EXPECTED_RESULTS says "
                f"{expected} ± {tolerance}: weights, data or configuration are not those that it was measured with"
            )
