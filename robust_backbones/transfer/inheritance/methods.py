"""The ways to fine-tune that the protocol compares: each a few lines over one engine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Learner, Totals, evaluate, train_one_epoch
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.classification.objectives import MicroBatch, Network, Objective, ObjectiveConfig
from robust_backbones.data.batches import steps_per_epoch, train_batches, val_batches
from robust_backbones.errors import DivergedError, InputError, PreemptedError
from robust_backbones.models import NormalizedModel, reference_shapes
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.features import Features
from robust_backbones.transfer.heads import HeadBank
from robust_backbones.transfer.inheritance.adapters import LowRankModel, PromptedModel
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.related_sets import Memory, RelatedSet
from robust_backbones.transfer.inheritance.weights import Weights, greedy_soup, interpolate, mean
from robust_backbones.transfer.linear_probe import order_of
from robust_backbones.transfer.protocol import Setting, split_held_out

PRETRAINED = "pretrained"
"""What the network before fine-tuning is called among methods."""

Penalty = Callable[[Tensor, Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] and the logits (N, K) over the set's classes -> what is added to the loss, a scalar."""


@dataclass(frozen=True)
class Job:
    """One network to be fine-tuned on one set: everything that a method may look at."""

    config: InheritanceConfig
    start: Checkpoint
    """The pre-trained network; it takes RGB."""
    target: RelatedSet
    seed: int
    """Decides the order of the images, dropout and what adapters start from."""
    compute: Compute
    memory: Memory
    fisher: Callable[[], Weights]
    """The diagonal Fisher information of ``start`` on pre-training images, by the names of its parameters."""
    weights: Callable[[str], Weights]
    """What another method, one of ``Method.needs``, has made of ``start`` on this set with this seed."""
    stop: Callable[[], object] = lambda: False
    """Asked after every step; once true, the job ends with PreemptedError."""

    def model(self, weights: Weights | None = None) -> NormalizedModel:
        """The network with these weights (those of ``start`` when not given), on the device."""
        checkpoint = self.start if weights is None else replace(self.start, state_dict=dict(weights))
        return self.on_device(NormalizedModel(checkpoint.build(), checkpoint.spec))

    def on_device(self, model: NormalizedModel) -> NormalizedModel:
        model.to(device=self.compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.config.epochs * steps_per_epoch(self.target.images, self.config.batch_size)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    paper: str
    run: Callable[[Job], NormalizedModel]
    """Gives the fine-tuned network."""
    needs: tuple[str, ...] = ()
    """Methods whose networks it is made from."""
    whole_network: bool = True
    """Whether the result is a network of the same architecture, so that it can be written and be part of a soup."""


class FineTuning(Objective):
    """Cross-entropy over the classes of a set, plus what a method adds."""

    def __init__(self, classes: Tensor, penalty: Penalty | None = None) -> None:
        super().__init__(ObjectiveConfig(), AttackConfig())
        self.classes, self.penalty = classes, penalty

    def loss(self, model: Network, adversary: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)[:, self.classes]
        loss = self.cross_entropy(logits, batch.labels)
        return loss if self.penalty is None else loss + self.penalty(batch.images, logits), logits


class Masked(nn.Module):
    """A network that knows the classes of one set only: images in [0, 1] -> logits (N, K) of ``classes``."""

    def __init__(self, network: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.classes]


def for_evaluation(model: NormalizedModel, compute: Compute) -> nn.Module:
    """``model`` in eval mode, as ``accuracy_on`` wants it: its twin with folded batch norms, which is faster."""
    if isinstance(model, PromptedModel):  # a twin would miss the prompt
        return model.eval()
    return FoldedTwin(model, compute.dtype)


def accuracy_on(related: RelatedSet, network: nn.Module, compute: Compute, memory: Memory) -> float:
    """Top-1 accuracy (0-100) on a set, among its classes."""
    masked = Masked(network, torch.tensor(related.classes, device=compute.device))
    batches = val_batches(related.images, 128, workers=memory.workers_for(related.images))
    found = evaluate(masked, batches, ThreatModel(), AttackConfig(), compute, description=f"evaluate on {related.name}")
    return found["clean_accuracy"]


def train(
    job: Job, model: NormalizedModel, penalty: Penalty | None = None, *, lr: float | None = None
) -> NormalizedModel:
    """The engine: SGD by the protocol on whatever of ``model`` needs a gradient; returns ``model``.

    Images are preprocessed as in evaluation, the rate warms up and goes to 0 by a cosine, batch norms are in train mode
    where the model lets them. An incomplete last batch is dropped.

    Raises:
        DivergedError: the loss is not finite. (On a foreign set it may well start at ten times that of chance.)
        PreemptedError: ``job.stop`` said so.
    """
    config, compute = job.config, job.compute
    images = job.target.images.seen_through(job.target.images.transform, seed=job.seed)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr if lr is None else lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, config, job.steps))
    objective = FineTuning(torch.tensor(job.target.classes, device=compute.device), penalty)
    learner = Learner(model, optimizer, scheduler, objective, ThreatModel(), compute, seed=job.seed)

    def on_log(step: int, totals: Totals) -> None:
        if job.stop():
            raise PreemptedError("asked to stop: finished cells are kept, and the same command goes on from them")

    for epoch in range(config.epochs):
        batches = train_batches(
            images,
            batch_size=config.batch_size,
            micro_batch_size=config.batch_size,
            epoch=epoch,
            workers=job.memory.workers_for(images),
        )
        train_one_epoch(
            learner,
            batches,
            steps=steps_per_epoch(images, config.batch_size),
            on_log=on_log,
            stop=job.stop,
            description=f"{job.target.name}, epoch {epoch + 1}/{config.epochs}",
        )
    return model.eval()


def rate(config: InheritanceConfig, steps: int, step: int) -> float:
    """The learning rate of a step (from 0) as a share of ``config.lr``: linear warm-up, then a cosine to 0."""
    warmup = min(config.warmup_steps, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def fine_tuning(job: Job) -> NormalizedModel:
    """Every weight learns."""
    return train(job, job.model())


def linear_probe(job: Job) -> NormalizedModel:
    """The classifier learns, on features of the frozen network; these are the same in every epoch: computed once.

    Batch norms and dropout are in eval mode. Outputs of classes that the set does not have stay what they are.
    """
    config, images = job.config, job.target.images
    (features,) = Features({"": job.start}, job.compute).of(
        images, batch_size=128, workers=job.memory.workers_for(images), description="features"
    )
    model = job.model()
    classifier = model.backbone.get_submodule(reference_shapes(job.start.spec.arch, job.start.spec.stem)[1])
    assert isinstance(classifier, nn.Linear)
    rows = torch.tensor(job.target.classes, device=job.compute.device)
    head = nn.utils.skip_init(nn.Linear, classifier.in_features, len(rows))
    head.load_state_dict({"weight": classifier.weight.detach()[rows], "bias": classifier.bias.detach()[rows]})
    setting = Setting(config.lr, config.weight_decay)
    bank = HeadBank([head], [job.seed], [setting], momentum=config.momentum, device=job.compute.device)
    labels, step = torch.tensor(images.labels, device=job.compute.device), 0
    for epoch in range(config.epochs):
        order = order_of(job.seed, epoch, len(images)).to(job.compute.device)
        for batch in order.split(config.batch_size)[: job.steps // config.epochs]:
            share = rate(config, job.steps, step)
            bank.train_epoch(features, labels, batch[None], batch_size=config.batch_size, rate=share)
            step += 1
    if not bank.finite.all():
        raise DivergedError(f"the linear probe on {job.target.name} diverges: give a lower --lr")
    with torch.no_grad():
        classifier.weight[rows], classifier.bias[rows] = bank.weight[0, 0], bank.bias[0, 0]
    return model.eval()


def lp_ft(job: Job) -> NormalizedModel:
    """Linear probe, then fine-tuning from there, each by the whole protocol."""
    return train(job, job.model(job.weights("linear_probe")))


def lwf(job: Job) -> NormalizedModel:
    """Cross-entropy plus ``distillation`` from the pre-trained network."""
    return train(job, job.model(), distillation(job))


def distillation(job: Job) -> Penalty:
    """Weight x KL(q ‖ p), where q and p are softmax(logits / T) before and now, over the set's classes.

    Equations 2 and 3 of the paper but for the classifier of the old task, which is here the one in training; without a
    factor T², as in the paper and in the public code of ImageNet-RIB.
    """
    teacher = FoldedTwin(job.model().eval(), job.compute.dtype)
    classes = torch.tensor(job.target.classes, device=job.compute.device)

    def penalty(images: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            before = F.log_softmax(teacher(images)[:, classes] / job.config.lwf_temperature, dim=1)
        now = F.log_softmax(logits / job.config.lwf_temperature, dim=1)
        return job.config.lwf_weight * F.kl_div(now, before, reduction="batchmean", log_target=True)

    return penalty


def ewc(job: Job) -> NormalizedModel:
    """Cross-entropy + lambda / 2 Σ_i F_i (θ_i - θ⁰_i)², with the true diagonal Fisher information F (``fisher``)."""
    model = job.model()
    return train(job, model, distance_to_start(model, job.config.ewc_strength / 2, job.fisher()))


def l2_init(job: Job) -> NormalizedModel:
    """Cross-entropy + strength x ‖θ - θ⁰‖²: what the public code of ImageNet-RIB calls EWC."""
    model = job.model()
    return train(job, model, distance_to_start(model, job.config.l2_init_strength))


def l2_sp(job: Job) -> NormalizedModel:
    """Cross-entropy + alpha / 2 ‖θ - θ⁰‖²: all layers have a starting point here, so that eq. 3's beta has no part."""
    model = job.model()
    return train(job, model, distance_to_start(model, job.config.l2_sp_strength / 2))


def distance_to_start(model: NormalizedModel, strength: float, importance: Weights | None = None) -> Penalty:
    """Strength x Σ_i F_i (θ_i - θ⁰_i)², where θ⁰ is what the model's parameters are now; F_i is 1 when not given."""
    parameters = dict(model.backbone.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    factors = {
        name: torch.ones_like(own) if importance is None else importance[name].to(own.device)
        for name, own in start.items()
    }

    def penalty(images: Tensor, logits: Tensor) -> Tensor:
        terms = [(factors[name] * (parameters[name] - start[name]).square()).sum() for name in parameters]
        return strength * torch.stack(terms).sum()

    return penalty


def lora(job: Job) -> NormalizedModel:
    """Low-rank updates of the convolutions; everything else is frozen. They are merged at the end."""
    model = LowRankModel(
        job.start.build(), job.start.spec, rank=job.config.lora_rank, alpha=job.config.lora_alpha, seed=job.seed
    )
    train(job, job.on_device(model))
    model.merge()
    return model


def visual_prompt(job: Job) -> NormalizedModel:
    """A frame of pixels around every image, of every set; the network is frozen."""
    config = job.config
    model = PromptedModel(job.start.build(), job.start.spec, width=config.frame, image_size=config.image_size)
    return train(job, job.on_device(model), lr=config.prompt_lr)


def wise_ft(job: Job, alpha: float) -> NormalizedModel:
    """(1 - alpha) x the pre-trained weights + alpha x the fine-tuned ones."""
    return job.model(interpolate(job.start.state_dict, job.weights("fine_tuning"), alpha))


def uniform_soup(job: Job) -> NormalizedModel:
    """The mean of the weights of ``config.soup``."""
    return job.model(
        mean([job.start.state_dict if name == PRETRAINED else job.weights(name) for name in job.config.soup])
    )


def greedy(job: Job) -> NormalizedModel:
    """The soup of those members of ``config.soup`` that do not lower accuracy on held-out images of the set.

    Members are trained here, on the rest of the images: those of other cells have seen the held-out ones.
    """
    images, config = job.target.images, job.config
    kept, held_out = split_held_out(images.labels, config.held_out, config.data_seed)
    if not held_out:
        raise InputError(f"{job.target.name} has one image a class, so that none can be held out for greedy_soup")
    made: dict[str, Weights] = {PRETRAINED: job.start.state_dict}
    part = replace(job, target=replace(job.target, images=images.take(kept)), weights=made.__getitem__)
    check_size(part.target, config)
    for name in ordered([name for name in config.soup if name != PRETRAINED], config):
        made[name] = find(name, config).run(part).backbone.state_dict()
    choosing = replace(job.target, images=images.take(held_out))

    def score(weights: Weights) -> float:
        return accuracy_on(choosing, for_evaluation(job.model(weights), job.compute), job.compute, job.memory)

    chosen, soup = greedy_soup({name: made[name] for name in config.soup}, score)
    print(f"greedy soup on {job.target.name}: {', '.join(chosen)}", flush=True)
    return job.model(soup)


METHODS = {
    "fine_tuning": Method("", fine_tuning),
    "linear_probe": Method("", linear_probe),
    "lp_ft": Method("Kumar et al. 2022, arXiv 2202.10054", lp_ft, needs=("linear_probe",)),
    "lwf": Method("Li & Hoiem 2016, arXiv 1606.09282", lwf),
    "ewc": Method("Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3", ewc),
    "l2_init": Method("Hwang et al. 2024, arXiv 2410.21582: the public code's EWC", l2_init),
    "l2_sp": Method("Li et al. 2018, arXiv 1802.01483, equation 3", l2_sp),
    "lora": Method("Hu et al. 2021, arXiv 2106.09685", lora),
    "visual_prompt": Method("Bahng et al. 2022, arXiv 2203.17274", visual_prompt, whole_network=False),
    "wise_ft": Method("Wortsman et al. 2022, arXiv 2109.01903", partial(wise_ft, alpha=0.5), needs=("fine_tuning",)),
    "uniform_soup": Method("Wortsman et al. 2022, arXiv 2203.05482", uniform_soup),
    "greedy_soup": Method("Wortsman et al. 2022, arXiv 2203.05482, recipe 1", greedy),
}
"""By name; ``wise_ft_ALPHA`` is WiSE-FT at another alpha in [0, 1]."""


def find(name: str, config: InheritanceConfig) -> Method:
    """The method of this name, with what it needs.

    Raises:
        InputError: there is none; or a soup of what has no weights to average.
    """
    if match := re.fullmatch(r"wise_ft_(\d*\.?\d+)", name):
        if float(match[1]) > 1:
            raise InputError(f"alpha of WiSE-FT is in [0, 1], got {name}")
        return replace(METHODS["wise_ft"], run=partial(wise_ft, alpha=float(match[1])))
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: choose of {', '.join(METHODS)}, or wise_ft_0.3 and the like")
    if name not in ("uniform_soup", "greedy_soup"):
        return METHODS[name]
    members = tuple(member for member in config.soup if member != PRETRAINED)
    for member in members:
        if "soup" in member or not find(member, config).whole_network:
            raise InputError(f"{member} cannot be part of a soup: choose methods that train the network itself")
    return METHODS[name] if name == "greedy_soup" else replace(METHODS[name], needs=members)


def ordered(names: list[str], config: InheritanceConfig) -> list[str]:
    """``names`` and what they need, each behind what it needs and once."""
    found: list[str] = []
    for name in names:
        found += [other for other in [*ordered(list(find(name, config).needs), config), name] if other not in found]
    return found


def check_size(related: RelatedSet, config: InheritanceConfig) -> None:
    """Raise ``InputError`` unless the set fills a batch."""
    if len(related.images) < config.batch_size:
        raise InputError(
            f"{related.name} has {len(related.images)} images to train on, less than a batch: lower --batch-size"
        )
