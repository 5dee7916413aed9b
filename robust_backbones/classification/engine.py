"""Training steps, epochs, and clean / robust accuracy: the loops shared by all classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.classification.compute import Compute, single_values_refused
from robust_backbones.classification.cuda_graph import Gradients, GraphedGradients, Parts
from robust_backbones.classification.folding import Unfolded, twin_of
from robust_backbones.classification.metrics import accuracy
from robust_backbones.classification.objectives import MicroBatch, Objective
from robust_backbones.data.stylization import stylize
from robust_backbones.errors import DivergedError
from robust_backbones.models import NormalizedModel
from robust_backbones.runs.distributed import ALONE, Processes
from robust_backbones.threat_models import ThreatModel

Batch = tuple[Tensor, Tensor]
"""uint8 images (N, 3, H, W) and class indices (N,)."""


class Learner:
    """A network in training and everything that changes with it; ``state_dict`` contains all of it.

    Attributes:
        model: the network itself, unwrapped, on the device.
        averaged: the exponential moving average of its weights, or None.
        step_count: batches learnt from so far (with free training, each of them several times).
        rate, epsilon: the last step's learning rate and radius of the ball.
    """

    def __init__(
        self,
        model: NormalizedModel,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        objective: Objective,
        threat_model: ThreatModel,
        compute: Compute,
        *,
        epsilon_warmup_steps: int = 0,
        ema_decay: float = 0.0,
        stylize: float = 0.0,
        mix: Callable[[Tensor, Tensor], Batch] | None = None,
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.objective = model, optimizer, scheduler, objective
        graphed = compute.compile_mode == "cuda-graphs" and processes.size == 1 and not objective.has_state
        if graphed:  # one of all that makes a step's gradients leaves none to torch.compile
            compute = replace(compute, compile_mode="default")
        self.compute, self.processes = compute, processes
        self._threat_model, self._epsilon_warmup_steps = threat_model, epsilon_warmup_steps
        self._stylize, self._mix = stylize, mix
        self._twin = (twin_of if threat_model.epsilon > 0 else Unfolded)(model, compute.attack_dtype)
        self._adversary = compute.compile(self._twin)
        network: nn.Module = model
        if processes.size > 1:
            # Statistics are averaged over the processes once a step (below), which uses what all of them saw; a
            # broadcast before each pass would only spread the main process's.
            network = DistributedDataParallel(model, broadcast_buffers=False)
        self._network = compute.compile(network)
        self._wrapped = network
        self._scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        self.averaged: AveragedModel | None = None
        if ema_decay > 0:
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self._generator = torch.Generator(compute.device).manual_seed(seed * 1_000_003 + processes.rank)
        self._gradients: Gradients = self._add_gradients
        if graphed:
            self._gradients = GraphedGradients(self._add_gradients, [*model.parameters()], self._generator)
        self.step_count = 0
        self.rate, self.epsilon = 0.0, 0.0
        self.meter = Meter(compute.device, processes)

    @property
    def evaluated(self) -> NormalizedModel:
        """The network to evaluate: the averaged one if there is one."""
        return self.model if self.averaged is None else cast(NormalizedModel, self.averaged.module)

    @property
    def threat_model(self) -> ThreatModel:
        """The current threat model: epsilon grows linearly over the warm-up's steps."""
        if self.step_count >= self._epsilon_warmup_steps:
            return self._threat_model
        share = (self.step_count + 1) / (self._epsilon_warmup_steps + 1)
        return replace(self._threat_model, epsilon=share * self._threat_model.epsilon)

    def step(self, batch: Sequence[Batch]) -> None:
        """Learn from one batch, given as micro-batches of equal size (Salman et al. 2020, eq. 2).

        The gradient is the mean over the micro-batches of all processes, that is, the gradient of the global batch.
        Batch norm statistics are over one micro-batch of one process.
        """
        self.model.train()
        threat_model = self.threat_model
        self.rate, self.epsilon = float(self.scheduler.get_last_lr()[0]), threat_model.epsilon
        on_device = [self._on_device(*part) for part in batch]
        for _ in range(self.objective.replays):
            self.optimizer.zero_grad()
            found = self._gradients(on_device, threat_model)
            for (_, labels), (loss, logits) in zip(on_device, found, strict=True):
                self.meter.add(loss, logits, labels, self.step_count)
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self._average_batch_norm_statistics()
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
        self.scheduler.step()
        self.step_count += 1

    def _add_gradients(self, parts: Parts, threat_model: ThreatModel) -> Parts:
        """Add up the gradients of micro-batches; the loss and the logits of each."""
        found = []
        for part, (images, labels) in enumerate(parts):
            with self._gradients_stay_local(last=part + 1 == len(parts)):
                self._twin.refresh()
                micro_batch = MicroBatch(images, labels, threat_model, part, self._generator)
                loss, logits = self.objective.loss(self._forward, self._adversary, micro_batch)
                self._scaler.scale(loss / len(parts)).backward()
            self.objective.after_backward()
            found.append((loss.detach(), logits.detach()))
        return found

    def _on_device(self, images: Tensor, labels: Tensor) -> Batch:
        images, labels = self.compute.to_unit_range(images), labels.to(self.compute.device, non_blocking=True)
        if self._stylize:
            images = stylize(images, self._stylize, generator=self._generator)
        return self._mix(images, labels) if self._mix else (images, labels)

    def _forward(self, images: Tensor) -> Tensor:
        with single_values_refused(), self.compute.autocast():
            return self._network(images).float()

    def _gradients_stay_local(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    @torch.no_grad()
    def _average_batch_norm_statistics(self) -> None:
        if self.processes.size == 1:
            return
        # Frozen ones are left alone: the mean of equal numbers may be another in its last digit.
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.training]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        if not buffers:
            return
        mean = self.processes.sum(torch.cat(buffers)) / self.processes.size
        for buffer, value in zip(buffers, mean.split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, schedule, loss scale, averages, and each process's generators and perturbations.

        All processes must call it together; plain tensors and numbers only.
        """
        device = self.compute.device
        own = {
            "generator": self._generator.get_state(),
            # Dropout draws from the global generators.
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "objective": self.objective.state_dict(),
        }
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step_count": self.step_count,
            "processes": self.processes.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken; another number of processes draws new random numbers."""
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self.step_count = state["step_count"]
        if len(state["processes"]) != self.processes.size:
            self._generator.manual_seed(hash((self._generator.initial_seed(), self.step_count)) & (2**62 - 1))
            return
        own = state["processes"][self.processes.rank]
        self._generator.set_state(own["generator"])
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and self.compute.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.compute.device)
        self.objective.load_state_dict(own["objective"])


class Meter:
    """Loss and accuracy since the last reading, summed on the device: reading every step would make a GPU wait."""

    _NEVER = torch.iinfo(torch.int64).max

    def __init__(self, device: torch.device, processes: Processes) -> None:
        self._processes = processes
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # of the loss, of right answers, of images
        self._first_bad_step = torch.tensor(self._NEVER, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, step: int) -> None:
        """Count one micro-batch of ``step``; remembers the first step whose loss is not finite."""
        labels = labels.argmax(1) if labels.ndim == 2 else labels  # of mixed images, the class with the largest share
        right, images = (logits.argmax(1) == labels).sum(), torch.full_like(loss, len(labels))
        self._sums += torch.stack([loss * images, right, images])
        self._first_bad_step.clamp_(max=torch.where(loss.isfinite(), self._NEVER, step))

    def read(self) -> tuple[Totals, int | None]:
        """The totals over all processes since the last reading, and the first step with a loss that is not finite."""
        loss, right, images = self._processes.sum(self._sums).tolist()
        first_bad_step = int(self._processes.min(self._first_bad_step).item())
        self._sums.zero_()
        self._first_bad_step.fill_(self._NEVER)
        return Totals(loss, right, images), None if first_bad_step == self._NEVER else first_bad_step


@dataclass
class Totals:
    """Sums over images: loss (nats), correct predictions, and number of images."""

    loss: float = 0.0
    right: float = 0.0
    images: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.loss + other.loss, self.right + other.right, self.images + other.images)

    def metrics(self) -> dict[str, float]:
        """``train_loss`` (nats) and ``train_accuracy`` (0-100), means over images."""
        return {"train_loss": self.loss / self.images, "train_accuracy": 100 * self.right / self.images}


def train_one_epoch(
    learner: Learner,
    micro_batches: Iterable[Batch],
    *,
    steps: int,
    first_step: int = 0,
    accumulate: int = 1,
    log_period: int = 50,
    on_log: Callable[[int, Totals], None] = lambda step, totals: None,
    stop: Callable[[], object] = lambda: False,
    classes: int = 0,
    description: str = "train",
) -> None:
    """The steps ``first_step`` to ``steps`` of one epoch, ``accumulate`` micro-batches each.

    Args:
        on_log: called after every ``log_period``-th step and the last one, with the number of this epoch's steps that
            are done and the totals on the perturbed images since the last call; all processes call it together.
        stop: asked after every step; once true, ``on_log`` is called at once.
        classes: number of classes, by which a diverging loss is recognised; 0 turns this off.

    Raises:
        DivergedError: the loss is not finite, or its mean between two calls is ten times that of chance.
    """
    source = iter(micro_batches)
    progress = tqdm(
        desc=description,
        total=steps,
        initial=first_step,
        unit="step",
        disable=None if learner.processes.is_main else True,
        leave=False,
    )
    with progress:
        for step in range(first_step, steps):
            batch = list(islice(source, accumulate))
            assert len(batch) == accumulate, "the loader ended before the epoch"
            learner.step(batch)
            progress.update()
            if (step + 1) % log_period == 0 or step + 1 == steps or stop():
                totals, bad_step = learner.meter.read()
                if bad_step is not None:
                    raise DivergedError(
                        f"the loss of step {bad_step + 1} is not finite (learning rate {learner.rate:g})"
                    )
                metrics = totals.metrics()
                if classes > 1 and metrics["train_loss"] > 10 * learner.objective.chance_loss(classes):
                    raise DivergedError(
                        f"the loss diverges: {metrics['train_loss']:.3g} around step {learner.step_count} "
                        f"(learning rate {learner.rate:g}), ten times that of chance"
                    )
                images = learner.processes.size * sum(len(labels) for _, labels in batch)
                progress.set_postfix_str(
                    f"{images * (progress.format_dict['rate'] or 0):.0f} img/s, loss {metrics['train_loss']:.3f}, "
                    f"accuracy {metrics['train_accuracy']:.1f} %",
                    refresh=False,
                )
                on_log(step + 1, totals)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    threat_model: ThreatModel,
    attack: AttackConfig,
    compute: Compute,
    *,
    generator: torch.Generator | None = None,
    processes: Processes = ALONE,
    metric: str = "top1",
    description: str = "evaluate",
) -> dict[str, float]:
    """Accuracy on clean images and on the worst neighbours that PGD finds; each process evaluates its part.

    Args:
        metric: one of ``metrics.METRICS``.

    Returns:
        ``clean_accuracy`` and ``robust_accuracy``, 0-100; equal at epsilon 0. An image counts as robust only if it is
        also correct when clean, so the second never exceeds the first.
    """
    was_training = model.training
    model.eval()
    outcomes = [torch.zeros(3, 0, dtype=torch.int64, device=compute.device)]  # rows: label, right, right under attack
    disable = None if processes.is_main else True
    for images, labels in tqdm(batches, desc=description, unit="batch", disable=disable, leave=False):
        images, labels = compute.to_unit_range(images), labels.to(compute.device, non_blocking=True)
        with compute.autocast():
            with torch.no_grad():
                right = still_right = model(images).argmax(1) == labels
            if threat_model.epsilon > 0:
                adversarial = pgd(model, images, labels, threat_model, attack, generator=generator, check=False)
                with torch.no_grad():
                    still_right = right & (model(adversarial).argmax(1) == labels)
        outcomes.append(torch.stack([labels, right, still_right]))
    model.train(was_training)
    gathered = processes.gather(torch.cat(outcomes, dim=1).cpu())
    labels, right, still_right = torch.cat(gathered, dim=1)
    images = labels.bincount()
    return {
        "clean_accuracy": accuracy(labels.bincount(right.double()), images, metric),
        "robust_accuracy": accuracy(labels.bincount(still_right.double()), images, metric),
    }
