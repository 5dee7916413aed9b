"""The fine-tuning methods that ImageNet-RIB compares, each a few lines on top of one training loop."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Batch
from robust_backbones.classification.folding import twin_of
from robust_backbones.data.batches import check_fills_batch
from robust_backbones.errors import DivergedError, InputError
from robust_backbones.models import NormalizedModel
from robust_backbones.transfer.config import Setting
from robust_backbones.transfer.features import Features
from robust_backbones.transfer.heads import HeadBank, linear_layer
from robust_backbones.transfer.inheritance.adapters import LowRankModel, PromptedModel
from robust_backbones.transfer.inheritance.config import PRETRAINED, InheritanceConfig
from robust_backbones.transfer.inheritance.job import Job, LossTerm, Weights, accuracy_on, for_evaluation, rate, train
from robust_backbones.transfer.networks import classifier_name
from robust_backbones.transfer.protocol import order_of, split_held_out


@dataclass(frozen=True)
class Method:
    """One fine-tuning method."""

    run: Callable[[Job], NormalizedModel]
    """Returns the fine-tuned network."""
    needs: tuple[str, ...] = ()
    """Methods whose resulting networks it needs."""
    whole_network: bool = True
    """Whether the result has the same architecture, so that it can be saved and be part of a soup."""


def linear_probe(job: Job) -> NormalizedModel:
    """Train the classifier on features of the frozen network, which are computed once for all epochs.

    Batch norms and dropout are in eval mode. Outputs for classes that are not in the set do not change.
    """
    config, images, rows, device = job.config, job.target.images, job.classes, job.compute.device
    (features,) = Features({"": job.start}, job.compute).of(images, workers=job.workers, description="features")
    model = job.model()
    classifier = model.backbone.get_submodule(classifier_name(job.start.spec))
    assert isinstance(classifier, nn.Linear)
    head = linear_layer(classifier.weight.detach()[rows], classifier.bias.detach()[rows])
    bank = HeadBank([head], [Setting(config.lr, config.weight_decay)], momentum=config.momentum, device=device)
    labels, step = torch.tensor(images.labels, device=device), 0
    for epoch in range(config.epochs):
        order = order_of(job.seed, epoch, len(images)).to(device)
        for batch in order.split(config.batch_size)[: job.steps // config.epochs]:
            share = rate(config, job.steps, step)
            bank.train_epoch(features, labels, batch[None], batch_size=len(batch), rate=share)
            step += 1
    if not bank.finite.all():
        raise DivergedError(f"the linear probe on {job.target.name} diverges: give a lower --lr")
    with torch.no_grad():
        classifier.weight[rows], classifier.bias[rows] = bank.weight[0, 0], bank.bias[0, 0]
    return model.eval()


def distillation(job: Job) -> LossTerm:
    """Weight x KL(q ‖ p), where q and p are softmax(logits / T) before and now, over the set's classes.

    Equations 2 and 3 of the paper, except that the classifier of the old task is the one in training; without a factor
    T², as in the paper and in the public code of ImageNet-RIB.
    """
    teacher, classes = twin_of(job.model(), job.compute.dtype), job.classes

    def term(images: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            before = F.log_softmax(teacher(images)[:, classes] / job.config.lwf_temperature, dim=1)
        now = F.log_softmax(logits / job.config.lwf_temperature, dim=1)
        return job.config.lwf_weight * F.kl_div(now, before, reduction="batchmean", log_target=True)

    return term


def near_start(job: Job, strength: float, importance: Weights | None = None) -> NormalizedModel:
    """Cross-entropy + ``distance_to_start``."""
    model = job.model()
    return train(job, model, distance_to_start(model, strength, importance))


def distance_to_start(model: NormalizedModel, strength: float, importance: Weights | None = None) -> LossTerm:
    """Strength x Σ_i F_i (θ_i - θ⁰_i)², where θ⁰ is the model's parameters at this call; F_i is 1 if not given."""
    parameters = dict(model.backbone.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    factors = {name: 1.0 if importance is None else importance[name].to(own.device) for name, own in start.items()}

    def term(images: Tensor, logits: Tensor) -> Tensor:
        terms = [(factors[name] * (parameters[name] - start[name]).square()).sum() for name in parameters]
        return strength * torch.stack(terms).sum()

    return term


def diagonal_fisher(
    model: NormalizedModel,
    batches: Iterable[Batch],
    compute: Compute,
    *,
    labels: int = 0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """F_i = E_x E_{y ~ p(y | x)} (∂ log p(y | x) / ∂θ_i)², the network in eval mode and in float32.

    The labels are the network's own predictions and gradients are squared image by image: with the data's labels, or
    with gradients of whole batches, it would be a different matrix (Kunstner et al. 2019, arXiv 1905.12558).

    Args:
        batches: uint8 images to average over; their labels are ignored.
        labels: 0 computes the expectation over y exactly, with a backward pass per class; otherwise the mean over this
            many labels drawn from p(y | x), which has the same expectation.
        generator: draws them; on the CPU.

    Returns:
        For every parameter of ``model.backbone`` by name, a tensor of its shape.
    """
    model = copy.deepcopy(model).eval().requires_grad_()
    parameters = dict(model.backbone.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for pixels, _ in batches:
        for image in compute.to_unit_range(pixels).split(1):
            log_p = model(image).log_softmax(1)[0]
            p = log_p.detach().exp()
            shares = dict(enumerate(p.tolist()))
            if labels:
                drawn = torch.multinomial(p.cpu(), labels, replacement=True, generator=generator)
                shares = {y: times / labels for y, times in enumerate(drawn.bincount().tolist()) if times}
            for y, share in shares.items():
                gradients = torch.autograd.grad(log_p[y], list(parameters.values()), retain_graph=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.addcmul_(gradient, gradient, value=share)
            count += 1
    return {name: total / count for name, total in sums.items()}


def lora(job: Job) -> NormalizedModel:
    """Train only the low-rank updates of a ``LowRankModel``, which are merged into the network at the end."""
    config, start = job.config, job.start
    model = LowRankModel(start.build(), start.spec, rank=config.lora_rank, alpha=config.lora_alpha, seed=job.seed)
    train(job, job.compute.place(model))
    model.merge()
    return model


def visual_prompt(job: Job) -> NormalizedModel:
    """Train a frame of pixels around all images of all sets; the network is frozen."""
    config = job.config
    model = PromptedModel(job.start.build(), job.start.spec, width=config.frame, image_size=config.image_size)
    return train(job, job.compute.place(model), lr=config.prompt_lr)


def combine(networks: Sequence[Weights], rule: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """Apply ``rule`` to every weight and batch norm statistic of the networks, in float32 whatever the files' dtype;
    counters of batch norms are the last network's."""
    return {
        name: rule([network[name].float() for network in networks]) if tensor.is_floating_point() else tensor
        for name, tensor in networks[-1].items()
    }


def interpolate(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """WiSE-FT: (1 - alpha) start + alpha end (Wortsman et al. 2022, arXiv 2109.01903, equation 1); the ends exactly."""
    return combine([start, end], lambda pair: torch.lerp(pair[0], pair[1], alpha))


def mean(members: Sequence[Weights]) -> dict[str, Tensor]:
    """The uniform soup (Wortsman et al. 2022, arXiv 2203.05482, eq. 1), whatever the order (sums are in float64)."""
    return combine(members, lambda tensors: torch.stack(tensors).double().mean(0).to(tensors[0].dtype))


def greedy_soup(
    members: Mapping[str, Weights], score: Callable[[Weights], float]
) -> tuple[list[str], dict[str, Tensor]]:
    """Add members from the best on; each stays if the soup is not worse with it (arXiv 2203.05482, recipe 1).

    Args:
        members: by name; among equals, the first in order is added first.
        score: accuracy on held-out images.

    Returns:
        The names of those in the soup, and its weights: its score is never below that of the best member.
    """
    scores = {name: score(member) for name, member in members.items()}
    first, *others = sorted(members, key=lambda name: -scores[name])
    chosen, soup, best = [first], dict(members[first]), scores[first]
    for name in others:
        with_it = mean([members[other] for other in [*chosen, name]])
        if (found := score(with_it)) >= best:
            chosen, soup, best = [*chosen, name], with_it, found
    return chosen, soup


def wise_ft(job: Job, alpha: float) -> NormalizedModel:
    return job.model(interpolate(job.start.state_dict, job.weights("fine_tuning"), alpha))


def uniform(job: Job) -> NormalizedModel:
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
    check_fills_batch(job.target.name, len(kept), config.batch_size)
    for name in ordered([name for name in config.soup if name != PRETRAINED], config):
        made[name] = find(name, config).run(part).backbone.state_dict()
    choosing = replace(job.target, images=images.take(held_out))

    def score(weights: Weights) -> float:
        return accuracy_on(choosing, for_evaluation(job.model(weights), job.compute), job.compute, workers=job.workers)

    chosen, soup = greedy_soup({name: made[name] for name in config.soup}, score)
    print(f"greedy soup on {job.target.name}: {', '.join(chosen)}", flush=True)
    return job.model(soup)


METHODS = {
    # Every weight learns.
    "fine_tuning": Method(lambda job: train(job, job.model())),
    "linear_probe": Method(linear_probe),
    # From the linear probe on, each by the whole protocol (Kumar et al. 2022, arXiv 2202.10054).
    "lp_ft": Method(lambda job: train(job, job.model(job.weights("linear_probe"))), needs=("linear_probe",)),
    # Li & Hoiem 2016, arXiv 1606.09282.
    "lwf": Method(lambda job: train(job, job.model(), distillation(job))),
    # Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3, with the true diagonal Fisher information.
    "ewc": Method(lambda job: near_start(job, job.config.ewc_strength / 2, job.fisher())),
    # Hwang et al. 2024, arXiv 2410.21582: the public code's EWC.
    "l2_init": Method(lambda job: near_start(job, job.config.l2_init_strength)),
    # Li et al. 2018, arXiv 1802.01483, equation 3; all layers have a starting point here, so that beta has no part.
    "l2_sp": Method(lambda job: near_start(job, job.config.l2_sp_strength / 2)),
    "lora": Method(lora),
    "visual_prompt": Method(visual_prompt, whole_network=False),
    "wise_ft": Method(partial(wise_ft, alpha=0.5), needs=("fine_tuning",)),
    "uniform_soup": Method(uniform),
    "greedy_soup": Method(greedy),
}
"""Methods by name; ``wise_ft_ALPHA`` is WiSE-FT at another alpha in [0, 1]."""


def find(name: str, config: InheritanceConfig) -> Method:
    """The method of this name, with what it needs.

    Raises:
        InputError: there is none; or it is a soup of methods without weights to average.
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
    """``names`` and the methods they need, each once and after those it needs."""
    found: list[str] = []
    for name in names:
        found += [other for other in [*ordered(list(find(name, config).needs), config), name] if other not in found]
    return found
