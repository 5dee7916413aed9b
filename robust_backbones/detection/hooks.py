"""Hooks between the training steps of a detector: weight averaging, precise BN, checkpoints, evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import inference_context
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robust_backbones.checkpoint.untrusted import read_file
from robust_backbones.detection.adversarial import replays
from robust_backbones.detection.collapse import sentences
from robust_backbones.detection.data_stream import TrainingStream, undisturbed
from robust_backbones.detection.visualize import ground_truth_beside_detections
from robust_backbones.errors import InputError, PreemptedError

_logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """Keeps an exponential moving average of a model's weights and batch norm statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)

        def update(averages: Any, values: Any, count: Any) -> None:  # those of one type
            # PyTorch's rounds whole numbers down: of a Swin the places in its table of relative positions.
            if averages[0].is_floating_point():
                average(averages, values, count)
            else:
                torch._foreach_copy_(averages, values)

        self._model = model
        self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._average.module

    def after_step(self) -> None:
        self._average.update_parameters(self._model)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)


class PreciseBN(hooks.PreciseBN):
    """Detectron2's, on images that depend only on the iteration, so that a resumed run uses the same ones."""

    @classmethod
    def build(cls, cfg: CfgNode, model: nn.Module) -> PreciseBN | None:
        """None if ``cfg`` does not ask for it or ``model`` has no trained batch norm."""
        if not (cfg.TEST.PRECISE_BN.ENABLED and hooks.get_bn_modules(model)):
            return None
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # its few images are not worth processes of their own
        return cls(cfg.TEST.EVAL_PERIOD, model, TrainingStream(cfg), cfg.TEST.PRECISE_BN.NUM_ITER)

    def update_stats(self) -> None:
        self._data_iter = None
        with undisturbed():
            seed_all_rng(self.trainer.iter)
            super().update_stats()


class Checkpoints(HookBase):
    """Saves every SOLVER.CHECKPOINT_PERIOD iterations, and the final detector; every process has to call it.

    If batches are replayed, this is after the last replay: checkpoints contain no perturbation.
    """

    def after_step(self) -> None:
        cfg, done = self.trainer.cfg, self.trainer.iter + 1
        period, each = cfg.SOLVER.CHECKPOINT_PERIOD, replays(cfg)
        if done == self.trainer.max_iter:
            self.trainer.save(final=True)
        elif done % each == 0 and done // period > (done - each) // period:
            self.trainer.save()


class Evaluation(HookBase):
    """Evaluates every TEST.EVAL_PERIOD iterations (0: never) and after the last; keeps the best detector and draws.

    Without DATASETS.TEST it does nothing.

    It runs after ``Checkpoints``, so that a failed evaluation loses no training; an interrupted one is repeated when
    the run resumes.
    """

    def __init__(self) -> None:
        self.results: dict[str, float | None] = {}
        """The last evaluation's metrics."""
        self.oddities: dict[str, dict[str, int]] = {}
        """By set, what was odd about its detections."""
        self.best: dict[str, Any] | None = None
        """``metric``, its ``value``, and the ``iteration`` after which it was measured."""
        self._evaluated_at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_at": self._evaluated_at, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated_at, self.best = state["evaluated_at"], state["best"]

    def before_train(self) -> None:
        self._recall_the_best()
        if self._is_due(self.trainer.start_iter) and self._evaluated_at < self.trainer.start_iter:
            self._run(self.trainer.start_iter, self.trainer.start_iter - 1)

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            try:
                self._run(self.trainer.iter + 1, self.trainer.iter)
            except PreemptedError:
                self.trainer.save()
                raise

    def _recall_the_best(self) -> None:
        """The final evaluation of a run comes after its last checkpoint, which a longer run continues from."""
        path, done = Path(self.trainer.cfg.OUTPUT_DIR) / "model_best.pth", self.trainer.start_iter
        if done and comm.is_main_process() and path.exists():
            best = read_file(path).get("best")
            if best is not None and best["iteration"] <= done:
                self.best = best

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter and self.trainer.cfg.DATASETS.TEST:  # not after a failure
            self._run(self.trainer.iter, self.trainer.iter)

    def _is_due(self, iteration: int) -> bool:
        period = self.trainer.cfg.TEST.EVAL_PERIOD if self.trainer.cfg.DATASETS.TEST else 0
        return period > 0 and 0 < iteration < self.trainer.max_iter and iteration % period == 0

    def _run(self, iteration: int, row: int) -> None:
        """Evaluate after ``iteration`` iterations, logged as number ``row``, also when repeated after a stop."""
        self.trainer.read_losses()
        with undisturbed(), self._stopped_between_images(iteration):
            cfg, model = self.trainer.cfg, self.trainer.evaluated_model
            self.results, self.oddities = measure(self.trainer, cfg, model, Path(cfg.OUTPUT_DIR))
            if comm.is_main_process():
                self._draw()
                numbers = {name: value for name, value in self.results.items() if value is not None}
                self.trainer.storage.put_scalars(**numbers, smoothing_hint=False, cur_iter=row)
                self.trainer.write_metrics()
                self._keep_the_best(iteration)
        self._evaluated_at = iteration
        comm.synchronize()

    @contextmanager
    def _stopped_between_images(self, iteration: int) -> Iterator[None]:
        """Not during the replays of a batch, which no checkpoint contains, nor if other processes would wait for it."""
        cfg, alone = self.trainer.cfg, comm.get_world_size() == 1

        def check(*_: object) -> None:
            if self.trainer.stop and alone and iteration % replays(cfg) == 0:
                raise PreemptedError(
                    f"asked to stop in the evaluation after iteration {iteration} of {self.trainer.max_iter}: the "
                    f"state is in {cfg.OUTPUT_DIR}, and --resume continues from it"
                )

        handle = self.trainer.evaluated_model.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()

    def _keep_the_best(self, iteration: int) -> None:
        cfg = self.trainer.cfg
        metric = cfg.TEST.BEST_METRIC or ("segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP")
        names = [name for name in self.results if f"/{name}".endswith(f"/{metric}")]
        if not names:
            raise InputError(f"TEST.BEST_METRIC {metric!r} is not measured: choose one of {', '.join(self.results)}")
        value = self.results[names[0]]
        if value is not None and (self.best is None or value > self.best["value"]):
            self.best = {"metric": names[0], "value": value, "iteration": iteration}
            self.trainer.save_best(self.best)
            _logger.info(f"best {names[0]} so far: {value:.2f} after iteration {iteration}; kept as model_best.pth")

    def _draw(self) -> None:
        """Ground truth beside detections, for TensorBoard."""
        cfg, model = self.trainer.cfg, self.trainer.evaluated_model
        dataset, mapper = cfg.DATASETS.TEST[0], DatasetMapper(cfg, False)
        items = DatasetCatalog.get(dataset)[: cfg.TEST.VISUALIZE]
        with inference_context(model), torch.no_grad():
            found = [model([mapper(item)])[0]["instances"].to("cpu") for item in items]
        pictures = ground_truth_beside_detections(items, found, MetadataCatalog.get(dataset))
        for item, picture in zip(items, pictures, strict=True):
            self.trainer.storage.put_image(f"{dataset}/{item['image_id']}", picture.transpose(2, 0, 1))


def measure(
    trainer: DefaultTrainer | type[DefaultTrainer], cfg: CfgNode, model: nn.Module, run: Path
) -> tuple[dict[str, float | None], dict[str, dict[str, int]]]:
    """The metrics on DATASETS.TEST and, by set, what is odd about the detections, which is logged as a warning.

    Both are empty in all processes but the first. ``run`` is the folder of the detector's training.
    """
    evaluators = [(name, trainer.build_evaluator(cfg, name)) for name in cfg.DATASETS.TEST]  # a name may be there twice
    metrics = flat_metrics(trainer.test(cfg, model, [evaluator for _, evaluator in evaluators]))
    oddities = {name: getattr(evaluator, "oddities", {}) for name, evaluator in evaluators}
    oddities = {name: kinds for name, kinds in oddities.items() if kinds}
    for sentence in sentences(oddities, run):
        _logger.warning(sentence)
    return metrics, oddities


def flat_metrics(results: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """``{"bbox": {"AP": 40.1}}`` -> ``{"bbox/AP": 40.1}``; undefined metrics (no object of a size) are None."""
    flat: dict[str, float | None] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = float(value) if math.isfinite(value) else None
    return flat
