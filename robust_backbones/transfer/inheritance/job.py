"""One network fine-tuned on one set: the training shared by all methods, and accuracy among a set's classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Learner, evaluate, train_one_epoch
from robust_backbones.classification.folding import twin_of
from robust_backbones.classification.objectives import MicroBatch, Network, Objective, ObjectiveConfig
from robust_backbones.data.batches import steps_per_epoch, train_batches, val_batches
from robust_backbones.models import NormalizedModel
from robust_backbones.runs.cells import check_stop
from robust_backbones.runs.signals import StopRequest
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.features import EVALUATION_BATCH
from robust_backbones.transfer.inheritance.adapters import PromptedModel
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.sets import RelatedSet

Weights = Mapping[str, Tensor]
"""A network's tensors by name."""
LossTerm = Callable[[Tensor, Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] and the logits (N, K) over the set's classes -> a scalar added to the loss."""


@dataclass(frozen=True)
class Job:
    """One network to be fine-tuned on one set: everything that a method may use."""

    config: InheritanceConfig
    start: Checkpoint
    """The pre-trained network; it takes RGB."""
    target: RelatedSet
    seed: int
    """Determines the order of the images, dropout and the initial weights of adapters."""
    compute: Compute
    workers: int
    """Processes that decode images."""
    fisher: Callable[[], Weights]
    """The diagonal Fisher information of ``start`` on pre-training images, by the names of its parameters."""
    weights: Callable[[str], Weights]
    """The result of another method, one of ``Method.needs``, from ``start`` on this set with this seed."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Asked after every step; once true, the job ends with PreemptedError."""

    def model(self, weights: Weights | None = None) -> NormalizedModel:
        """The network with these weights (those of ``start`` when not given), on the device."""
        checkpoint = self.start if weights is None else replace(self.start, state_dict=dict(weights))
        return self.compute.place(checkpoint.model())

    @property
    def classes(self) -> Tensor:
        """The mask of the set, on the device."""
        return torch.tensor(self.target.classes, device=self.compute.device)

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        config = self.config
        return config.epochs * steps_per_epoch(self.target.images, config.batch_size, keep_last=config.keep_last)


class FineTuning(Objective):
    """Cross-entropy over the classes of a set, plus what a method adds."""

    def __init__(self, classes: Tensor, term: LossTerm | None = None) -> None:
        super().__init__(ObjectiveConfig(), AttackConfig())
        self.classes, self.term = classes, term

    def loss(self, model: Network, adversary: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)[:, self.classes]
        loss = self.cross_entropy(logits, batch.labels)
        return loss if self.term is None else loss + self.term(batch.images, logits), logits


def train(
    job: Job, model: NormalizedModel, term: LossTerm | None = None, *, lr: float | None = None
) -> NormalizedModel:
    """SGD by the protocol on all parameters of ``model`` that require a gradient; returns ``model``.

    Images are preprocessed as in evaluation, the learning rate warms up and goes to 0 by a cosine, and batch norms are
    in train mode unless the model freezes them. An incomplete last batch is dropped, unless ``keep_last``.

    Raises:
        DivergedError: the loss is not finite. (On a foreign set it may well start at ten times that of chance.)
        PreemptedError: ``job.stop`` asked for it.
    """
    config = job.config
    images = job.target.images.seen_through(job.target.images.transform, seed=job.seed)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr if lr is None else lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, config, job.steps))
    objective = FineTuning(job.classes, term)
    learner = Learner(model, optimizer, scheduler, objective, ThreatModel(), job.compute, seed=job.seed)

    size, workers, keep = config.batch_size, job.workers, config.keep_last
    for epoch in range(config.epochs):
        train_one_epoch(
            learner,
            train_batches(images, batch_size=size, micro_batch_size=size, epoch=epoch, workers=workers, keep_last=keep),
            steps=steps_per_epoch(images, size, keep_last=keep),
            on_log=lambda step, totals: check_stop(job.stop),
            stop=lambda: job.stop,
            description=f"{job.target.name}, epoch {epoch + 1}/{config.epochs}",
        )
    return model.eval()


def rate(config: InheritanceConfig, steps: int, step: int) -> float:
    """The learning rate of a step (from 0) as a share of ``config.lr``: linear warm-up, then a cosine to 0."""
    warmup = min(config.warmup_steps, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Masked(nn.Module):
    """A network restricted to the classes of one set: images in [0, 1] -> logits (N, K) of ``classes``."""

    def __init__(self, network: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.classes]


def for_evaluation(model: NormalizedModel, compute: Compute) -> nn.Module:
    """``model`` in eval mode for ``accuracy_on``: its twin with folded batch norms, which is faster."""
    if isinstance(model, PromptedModel):  # a twin would miss the prompt
        return model.eval()
    return twin_of(model, compute.dtype)


def accuracy_on(related: RelatedSet, network: nn.Module, compute: Compute, *, workers: int) -> float:
    """Top-1 accuracy (0-100) on a set, among its classes."""
    masked = Masked(network, torch.tensor(related.classes, device=compute.device))
    batches = val_batches(related.images, EVALUATION_BATCH, workers=workers)
    found = evaluate(masked, batches, ThreatModel(), AttackConfig(), compute, description=f"evaluate on {related.name}")
    return found["clean_accuracy"]
