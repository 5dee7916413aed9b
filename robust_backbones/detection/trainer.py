"""Detectron2's DefaultTrainer made trustworthy: guarded weights, exact resumption, bfloat16, a record at the end."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import robust_backbones.detection.published  # noqa: F401  # makes robust://NAME a path
from robust_backbones.classification.compute import arithmetic
from robust_backbones.detection.adversarial import AttackedDetector, FreeStream, replays
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.data_stream import TrainingStream, WorkerMapper, random_state
from robust_backbones.detection.evaluators import CocoEvaluator, VocEvaluator
from robust_backbones.detection.hooks import Checkpoints, Evaluation, WeightAverage, build_precise_bn, flat_metrics
from robust_backbones.detection.roi_align import use_float32_boxes
from robust_backbones.errors import DivergedError, InputError, PreemptedError, TrainingFailedError
from robust_backbones.runs.distributed import StopRequest, stop_on_signals, synchronize_on_cpu
from robust_backbones.runs.files import write_jsonl
from robust_backbones.runs.record import RunRecord

_logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates one detector.

    Steps, losses and updates are Detectron2's. A run that was cut off goes on with the images, the augmentation and the
    random numbers that it would have had; what evaluations draw does not reach training.
    """

    checkpointer: BackboneCheckpointer

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        self._clock, self._seconds_before = time.perf_counter(), 0.0
        self.cfg = cfg
        # In Detectron2's order: each of these draws random numbers.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.stream = TrainingStream(cfg)

        device = torch.device(cfg.MODEL.DEVICE)
        if comm.get_world_size() > 1:
            if device.type == "cpu":
                synchronize_on_cpu(model, nn.SyncBatchNorm)
            devices = [comm.get_local_rank()] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        self._replays = replays(cfg)
        batches = FreeStream(self.stream, cfg) if cfg.ADVERSARIAL.KIND == "free" else self.stream
        trained = AttackedDetector(model, cfg) if cfg.ADVERSARIAL.KIND == "pgd" else model
        if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
            scaler = torch.amp.GradScaler(device.type)
            self._trainer = AMPTrainer(trained, batches, optimizer, grad_scaler=scaler)
        else:
            self._trainer = SimpleTrainer(trained, batches, optimizer)
        self._bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=_runs_in_bfloat16(cfg))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = BackboneCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._random_states: list[dict[str, Any]] = []
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, with boxes in float32 where features are not, and MODEL.FAST_ROI_ALIGN."""
        model: nn.Module = super().build_model(cfg)
        use_float32_boxes(model, fast=cfg.MODEL.FAST_ROI_ALIGN)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's, with SOLVER.OPTIMIZER and SOLVER.BACKBONE_MULTIPLIER."""
        solver, backbone = cfg.SOLVER, backbone_tensors(model)
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if name in backbone else 1.0,
        )
        shared = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
        if solver.OPTIMIZER == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **shared)
        else:
            optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)
        return maybe_add_gradient_clipping(cfg, optimizer)

    def build_hooks(self) -> list[HookBase | None]:
        cfg, model = self.cfg, self.checkpointer.model
        self.average = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
        self.evaluation = Evaluation(
            cfg.TEST.EVAL_PERIOD,
            lambda: self.test(cfg, self.evaluated_model),
            metric=cfg.TEST.BEST_METRIC or ("segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"),
            dataset=cfg.DATASETS.TEST[0],
            images=cfg.TEST.VISUALIZE,
        )
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self.average,
            build_precise_bn(cfg, model),
            Checkpoints(cfg.SOLVER.CHECKPOINT_PERIOD, self._replays),
            self.evaluation,
        ]

    @property
    def evaluated_model(self) -> nn.Module:
        """The detector with the weights that count: their average where one is kept."""
        return self.average.model if self.average else self.checkpointer.model

    @property
    def seconds(self) -> float:
        """What the run has taken, those before the checkpoint that this process went on from included."""
        return self._seconds_before + time.perf_counter() - self._clock

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter and comm.is_main_process():
            # What was logged behind the checkpoint will be logged again.
            path = Path(self.cfg.OUTPUT_DIR) / "metrics.json"
            lines = path.read_text().splitlines() if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last one off
            write_jsonl(path, [row for row in rows if row["iteration"] < self.start_iter])

    def train(self) -> None:
        """Train from ``start_iter`` to the end, and evaluate.

        Raises:
            PreemptedError: SIGTERM or SIGUSR1 came; the state is written.
            DivergedError: a loss is not finite.
        """
        _logger.info(f"Starting training from iteration {self.start_iter}")
        if comm.is_main_process():
            self.register_hooks([hooks.PeriodicWriter(self.build_writers())])
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, stop_on_signals() as stop:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    between_batches = (self.iter + 1) % self._replays == 0
                    if self.iter + 1 < self.max_iter and between_batches and self._asked_to_stop(stop):
                        self.save()
                        raise PreemptedError(
                            f"asked to stop after iteration {self.iter + 1} of {self.max_iter}: the state is in "
                            f"{self.cfg.OUTPUT_DIR}, and --resume goes on with it"
                        )
                    self.iter += 1
            except FloatingPointError as error:
                reason = str(error).splitlines()[0]
                raise DivergedError(
                    f"training diverged ({reason}): lower SOLVER.BASE_LR, or clip gradients with "
                    "SOLVER.CLIP_GRADIENTS.ENABLED True"
                ) from None
            finally:
                self.after_train()

    def run_step(self) -> None:
        # Only convolutions and matrix products run in bfloat16: losses, gradients' sums and the update do not.
        with self._bfloat16:
            super().run_step()

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether any process was: they stop together."""
        if comm.get_world_size() == 1:
            return bool(stop)
        asked = torch.tensor(int(bool(stop)), device=self.cfg.MODEL.DEVICE)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint to go on from, or the final detector; every process has to call it."""
        self._random_states = comm.all_gather({"start": self.stream.random_state_at_start, "now": random_state()})
        name = "model_final" if final else f"model_{self.iter:07d}"
        # Nothing is trained from the final file: it holds the weights that the evaluation will see.
        self.checkpointer.save(name, model=self.evaluated_model if final else None, categories=self.categories)
        comm.synchronize()

    def save_best(self, best: Mapping[str, Any]) -> None:
        self.checkpointer.save(
            "model_best", model=self.evaluated_model, resumable=False, best=dict(best), categories=self.categories
        )

    @property
    def categories(self) -> list[dict[str, Any]]:
        """COCO's list of categories for the detector's classes, in their order."""
        metadata = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0])
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        by_class = {number: category for category, number in ids.items()}
        return [{"id": by_class.get(i, i + 1), "name": name} for i, name in enumerate(metadata.thing_classes)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "random_states": self._random_states, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._seconds_before = state_dict.get("seconds", 0.0)  # earlier files do not say
        states = state_dict["random_states"]
        if len(states) == comm.get_world_size():
            own = states[comm.get_rank()]
            self.stream.go_on((self.iter + 1) // self._replays, at_start=own["start"], now=own["now"])
        else:
            _logger.warning(
                f"the run was begun by {len(states)} processes and goes on with {comm.get_world_size()}: from here on "
                "its images and random numbers are others than the unbroken run's"
            )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=WorkerMapper(DatasetMapper(cfg, False)))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind == "coco":
            tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
            folder = str(Path(cfg.OUTPUT_DIR) / "inference")
            return CocoEvaluator(dataset_name, tasks, output_dir=folder, reference=cfg.TEST.REFERENCE_EVAL)
        if kind == "pascal_voc":
            return VocEvaluator(dataset_name)
        raise InputError(f"no evaluator for {dataset_name} of kind {kind}: choose a COCO- or VOC-format data set")


def check_weights(cfg: CfgNode, *, resume: bool, whole_detector: bool) -> None:
    """Load the run's weights into a detector that is thrown away: a wrong file stops it before anything is written.

    Takes seconds, and in the first process alone: no worker of a multi-GPU launch has to fail for it.

    Raises:
        InputError: what the checkpoint guard has to say.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    checkpointer = BackboneCheckpointer(build_model(cfg), cfg.OUTPUT_DIR, cfg=cfg, whole_detector=whole_detector)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume and not whole_detector)


def train(cfg: CfgNode, *, resume: bool) -> None:
    """Train from MODEL.WEIGHTS (or the last checkpoint), evaluate, and write record.json to OUTPUT_DIR."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    if not comm.is_main_process():  # the others hold no results
        return
    metrics = dict(trainer.evaluation.results)
    if cfg.TEST.EVAL_PERIOD > 0 and (best := trainer.evaluation.best):
        metrics |= {f"best/{best['metric']}": best["value"], "best/iteration": best["iteration"]}
    _write_record(cfg, metrics, trainer.checkpointer, trainer.seconds, "record.json")


def evaluate(cfg: CfgNode) -> None:
    """Evaluate the detector in MODEL.WEIGHTS and write eval_record.json to OUTPUT_DIR."""
    start = time.perf_counter()
    model = Trainer.build_model(cfg)
    checkpointer = BackboneCheckpointer(model, cfg=cfg, whole_detector=True)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    metrics = flat_metrics(Trainer.test(cfg, model))
    if comm.is_main_process():
        _write_record(cfg, metrics, checkpointer, time.perf_counter() - start, "eval_record.json")


def _write_record(
    cfg: CfgNode, metrics: Mapping[str, float | None], checkpointer: BackboneCheckpointer, seconds: float, name: str
) -> None:
    backbone, threat_model = checkpointer.provenance()
    config = yaml.safe_load(cfg.dump())
    if cfg.SOLVER.AMP.DTYPE == "bfloat16" and not _runs_in_bfloat16(cfg):
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


def _runs_in_bfloat16(cfg: CfgNode) -> bool:
    wanted = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16"
    return wanted and arithmetic("bf16", torch.device(cfg.MODEL.DEVICE)) == torch.bfloat16


def check_expected(cfg: CfgNode, metrics: Mapping[str, float | None]) -> None:
    """Hold a record's metrics against TEST.EXPECTED_RESULTS: rows of task, metric, value and tolerance.

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
