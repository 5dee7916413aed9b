"""Detectron2's DefaultTrainer made trustworthy: guarded weights, exact resumption, a record at the end."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robust_backbones.cpu.batch_norm import synchronize_on_cpu
from robust_backbones.detection.adversarial import AttackedDetector, FreeStream, replays
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.collapse import merged
from robust_backbones.detection.config import check_config, usable
from robust_backbones.detection.data_stream import TrainingStream, WorkerMapper, random_state
from robust_backbones.detection.datasets import (
    categories,
    check_datasets,
    class_names,
    counted,
    match_classes,
    register_datasets,
)
from robust_backbones.detection.evaluators import build_evaluator
from robust_backbones.detection.fast.compiled import fixed_sides
from robust_backbones.detection.fast.metrics import DeferredAMPTrainer, DeferredTrainer
from robust_backbones.detection.fast.rcnn import BatchedRCNN
from robust_backbones.detection.hooks import Checkpoints, Evaluation, PreciseBN, WeightAverage
from robust_backbones.detection.layer_decay import layer_factors
from robust_backbones.detection.left_out import leave_out
from robust_backbones.detection.metrics_file import MetricsFile
from robust_backbones.detection.predictor import build_detector
from robust_backbones.detection.run_folder import (
    check_folder,
    runs_in_bfloat16,
    seed_processes,
    write_config,
    write_record,
)
from robust_backbones.errors import DivergedError, InputError, PreemptedError, plural
from robust_backbones.runs.clock import RunClock
from robust_backbones.runs.signals import StopRequest, stop_on_signals

_logger = logging.getLogger(__name__)
_NOT_DECAYED = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "gamma")
"""Embeddings, and the scales of ConvNeXt's blocks: their authors use no weight decay on them."""


class Trainer(DefaultTrainer):
    """Trains and evaluates one detector. Used like Detectron2's: ``resume_or_load``, then ``train``.

    Steps, losses and updates are Detectron2's. A resumed run gets the same images, augmentation and random numbers as
    an uninterrupted one; evaluations do not affect training's random numbers.

    Args:
        cfg: From ``load_config``, or Detectron2's ``get_cfg()`` after ``add_config``.
        checked: The caller has checked the data sets and OUTPUT_DIR's owner, and has seeded each process; otherwise
            each is seeded with SEED, drawn at random if not set.
        data_warnings: The counts of the caller's check, for the record.

    Raises:
        InputError: a value is out of range; the data sets are missing, damaged or do not match; OUTPUT_DIR holds
            another run.
    """

    checkpointer: BackboneCheckpointer

    def __init__(
        self, cfg: CfgNode, *, checked: bool = False, data_warnings: Mapping[str, dict[str, int]] | None = None
    ) -> None:
        check_config(cfg)
        register_datasets(cfg)
        if not checked:
            thawed = cfg.clone()
            thawed.defrost()
            check_folder(thawed, resume=True)
            cfg = thawed  # with the seed, the skipped images and the history of the run there
            leave_out(cfg)
            warnings = check_datasets(cfg) if comm.is_main_process() else []
            for warning in warnings:
                _logger.warning(warning)
            data_warnings = counted(warnings)
            seed_processes(cfg)
            cfg.freeze()
        if not cfg.DATASETS.TRAIN:
            raise InputError("there is nothing to train on: give --train, or name data sets in DATASETS.TRAIN")
        match_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], class_names(cfg.DATASETS.TRAIN[0]))
        TrainerBase.__init__(self)
        self.cfg, self.clock = cfg, RunClock(cfg.OUTPUT_DIR)
        self._data_warnings = data_warnings or {}
        # In Detectron2's order: each of these draws random numbers.
        model = self.build_model(cfg)
        with usable("optimizer"):
            optimizer = self.build_optimizer(cfg, model)
        with usable("loader of images"):
            self.stream = TrainingStream(cfg)

        device = torch.device(cfg.MODEL.DEVICE)
        if comm.get_world_size() > 1:
            if device.type == "cpu":
                model = synchronize_on_cpu(model, nn.SyncBatchNorm)
            devices = [comm.get_local_rank()] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        self._replays = replays(cfg)
        batches = FreeStream(self.stream, cfg) if cfg.ADVERSARIAL.KIND == "free" else self.stream
        trained = AttackedDetector(model, cfg) if cfg.ADVERSARIAL.KIND == "pgd" else model
        self._trainer = build_steps(cfg, trained, batches, optimizer)
        # Only convolutions and matrix products run in bfloat16: losses, sums of gradients and the update do not.
        self._bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=runs_in_bfloat16(cfg))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = BackboneCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, trainer=weakref.proxy(self))
        self._loaded = False
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.stop = StopRequest()
        self._random_states: list[dict[str, Any]] = []
        self._metrics_file: MetricsFile | None = None
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_detector(cfg)
        if cfg.MODEL.COMPILE and isinstance(model, BatchedRCNN):  # not of a trained one that is attacked
            model.sides = fixed_sides(cfg)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's, with SOLVER.OPTIMIZER, SOLVER.BACKBONE_MULTIPLIER and SOLVER.LAYER_DECAY."""
        solver, backbone = cfg.SOLVER, backbone_tensors(model)
        factors = layer_factors(model, solver.LAYER_DECAY) if solver.LAYER_DECAY != 1 else {}
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            # Detectron2's bias_lr_factor would take the place of the other factors.
            lr_factor_func=lambda name: (
                factors.get(name, 1.0)
                * (solver.BACKBONE_MULTIPLIER if name in backbone else 1.0)
                * (solver.BIAS_LR_FACTOR if name.endswith(".bias") else 1.0)
            ),
            overrides={name: {"weight_decay": 0.0} for name in _NOT_DECAYED},
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
        self.evaluation = Evaluation()
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self.average,
            PreciseBN.build(cfg, self.evaluated_model),
            Checkpoints(),
            self.evaluation,
        ]

    def build_writers(self) -> list[EventWriter]:
        folder = Path(self.cfg.OUTPUT_DIR)
        self._metrics_file = MetricsFile(folder / "metrics.json", self.start_iter)
        return [CommonMetricPrinter(self.max_iter), self._metrics_file, TensorboardXWriter(str(folder))]

    def write_metrics(self) -> None:
        """Write what was logged to metrics.json, in the first process."""
        if self._metrics_file:
            self._metrics_file.write()

    @property
    def evaluated_model(self) -> nn.Module:
        """The detector with the weights to evaluate: their moving average if there is one."""
        return self.average.model if self.average else self.checkpointer.model

    def resume_or_load(self, resume: bool = True) -> None:
        """Load MODEL.WEIGHTS, or with ``resume`` the newest checkpoint in OUTPUT_DIR if there is one.

        Raises InputError if they do not fill the backbone or do not fit the configuration.
        """
        super().resume_or_load(resume)
        self._loaded = True
        if self.start_iter:
            # The optimiser's own rates are those of the schedule that the checkpoint was written with.
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate

    def train(self) -> dict[str, float | None]:
        """Train from ``start_iter`` to the end, evaluate, and write record.json to OUTPUT_DIR.

        Returns:
            The record's metrics, such as ``bbox/AP``, 0 to 100; empty in all processes but the first.

        Raises:
            InputError: no weights have been loaded, and random ones were not requested.
            PreemptedError: SIGTERM or SIGUSR1 was received; the state is saved.
            DivergedError: a loss is not finite.
        """
        cfg = self.cfg
        if not (self._loaded or cfg.MODEL.BACKBONE.FROM_SCRATCH):
            raise InputError("the backbone is random: call resume_or_load() before train()")
        _logger.info(f"Starting training from iteration {self.start_iter}")
        write_config(cfg)
        if comm.is_main_process():
            self.register_hooks([hooks.PeriodicWriter(self.build_writers())])
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, stop_on_signals() as self.stop:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    between_batches = (self.iter + 1) % self._replays == 0
                    if self.iter + 1 < self.max_iter and between_batches and self._asked_to_stop():
                        self.save()
                        raise PreemptedError(
                            f"asked to stop after iteration {self.iter + 1} of {self.max_iter}: the state is in "
                            f"{cfg.OUTPUT_DIR}, and --resume continues from it"
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
        if not comm.is_main_process():  # the others hold no results
            return {}
        metrics = dict(self.evaluation.results)
        if cfg.TEST.EVAL_PERIOD > 0 and (best := self.evaluation.best):
            metrics |= {f"best/{best['metric']}": best["value"], "best/iteration": best["iteration"]}
        backbone, threat_model = self.checkpointer.provenance()
        write_record(
            "record.json",
            cfg,
            metrics,
            backbone=backbone,
            threat_model=threat_model,
            seconds=self.clock.seconds,
            data_warnings=merged(self._data_warnings, self.evaluation.oddities),
        )
        return metrics

    def run_step(self) -> None:
        # RetinaNet's focal loss is TorchScript, which computes its first calls in a process in another way than the
        # later ones: a resumed run would not be the unbroken one.
        with self._bfloat16, torch.jit.optimized_execution(False):
            super().run_step()

    def read_losses(self) -> None:
        """Log the losses that MODEL.FAST_STEP has left on the device; every process has to call it."""
        if isinstance(self._trainer, DeferredTrainer | DeferredAMPTrainer):
            self._trainer.read_losses()

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop: they stop together."""
        if comm.get_world_size() == 1:
            return bool(self.stop)
        asked = torch.tensor(int(bool(self.stop)), device=self.cfg.MODEL.DEVICE)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint to resume from, or the final detector; every process has to call it."""
        self.read_losses()
        self.write_metrics()  # before the checkpoint: what it covers is not logged again
        own = {"start": self.stream.random_state_at_start, "now": random_state()}
        if (count := self.checkpointer.model.__dict__.get("loss_normalizer")) is not None:
            own["loss_normalizer"] = count  # of a RetinaNet, which keeps it outside its state
        self._random_states = comm.all_gather(own)
        name = "model_final" if final else f"model_{self.iter:07d}"
        if final and self.average:  # evaluated is the average, from which a longer run could not continue
            self.checkpointer.save(name, model=self.average.model, resumable=False, categories=self.categories)
            name = f"model_{self.iter:07d}"
        self.checkpointer.save(name, categories=self.categories)
        if comm.is_main_process():
            self.clock.save()
        comm.synchronize()

    def save_best(self, best: Mapping[str, Any]) -> None:
        self.checkpointer.save(
            "model_best", model=self.evaluated_model, resumable=False, best=dict(best), categories=self.categories
        )

    @property
    def categories(self) -> list[dict[str, Any]]:
        """COCO's list of categories for the detector's classes, in their order."""
        return categories(self.cfg.DATASETS.TRAIN[0])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "random_states": self._random_states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.clock.resume(state_dict.get("seconds"))
        states = state_dict["random_states"]
        if len(states) == comm.get_world_size():
            own = states[comm.get_rank()]
            self.stream.resume_from((self.iter + 1) // self._replays, at_start=own["start"], now=own["now"])
            if "loss_normalizer" in own:
                self.checkpointer.model.loss_normalizer = own["loss_normalizer"]
        else:
            _logger.warning(
                f"the run was started by {plural(len(states), 'process')} and is resumed by {comm.get_world_size()}: "
                "from here on it sees other images and random numbers than the unbroken run"
            )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=WorkerMapper(DatasetMapper(cfg, False)))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def build_steps(
    cfg: CfgNode, model: nn.Module, batches: Iterable[Any], optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Detectron2's trainer of single steps; with MODEL.FAST_STEP it reads losses only from time to time."""
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        kind = DeferredAMPTrainer if cfg.MODEL.FAST_STEP else AMPTrainer
        return kind(model, batches, optimizer, grad_scaler=torch.amp.GradScaler(torch.device(cfg.MODEL.DEVICE).type))
    return (DeferredTrainer if cfg.MODEL.FAST_STEP else SimpleTrainer)(model, batches, optimizer)
