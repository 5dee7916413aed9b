"""Steps of adversarial training: ours, with each switch that makes it fast, against MadryLab's `robustness`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import (
    MEAN_LOSS_LIMIT,
    equal_losses,
    held_out_images,
    load_images,
    load_network,
    outcome,
    trained_network,
)
from benchmarks.peers import without_cuda_calls
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work
from robust_backbones import cpu
from robust_backbones.attacks import AttackConfig
from robust_backbones.classification.compute import COMPILE_MODES, Compute
from robust_backbones.classification.cuda_graph import GraphedGradients
from robust_backbones.classification.engine import Learner
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.models import NormalizedModel
from robust_backbones.threat_models import ThreatModel

LIBRARY = "robustness 1.2.1.post2"
SAME = f"{LIBRARY}, use_best 0"
PLAIN = "plain PyTorch"
CHANNELS_LAST = "plain PyTorch, channels last"
PLAIN_CONVOLUTIONS = "ours: folded attack, PyTorch's own convolutions, fp32"
FP32 = "ours: folded attack, fp32"
BF16_ATTACK = "ours: attack in bf16, step in fp32"
BF16 = "ours: attack and step in bf16"
STANDARD = {"fp32": "ours: standard step (epsilon 0), fp32", "bf16": "ours: standard step (epsilon 0), bf16"}
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Work):
    """A step of PGD-3 l-2 training, with MadryLab's library as the peer."""

    name: ClassVar[str] = "training-step"
    title: ClassVar[str] = "PGD-3 ℓ2 training step"
    on_gpu: ClassVar[bool] = True
    warm_up: ClassVar[int] = 0
    """The check has done it."""

    arch: str = "resnet50"
    image_size: int = 224
    batch_size: int = 0
    """0: 128 on a GPU, 16 on a CPU."""
    epsilon: float = 1.0

    @property
    def _batch_size(self) -> int:
        return self.batch_size or (128 if self.device == "cuda" else 16)

    def ways(self) -> list[Way]:
        options = {
            "checkpoint": str(trained_network(self.output, self.arch, self.device)),
            "images": str(held_out_images(self.output, self._batch_size, self.image_size, contrast=0.5)),
            "epsilon": self.epsilon,
        }

        def our_way(name: str, precision: str, attack_precision: str, **more: Any) -> Way:
            compute = {"precision": precision, "attack_precision": attack_precision}
            return Way(name, "training_step:ours", {**options, **compute, **more})

        standard = {"epsilon": 0.0}
        ways = [
            Way(LIBRARY, "training_step:madry", {**options, "use_best": True}, peer="robustness"),
            Way(SAME, "training_step:madry", {**options, "use_best": False}, peer="robustness"),
            Way(PLAIN, "training_step:plain", options),
            Way(CHANNELS_LAST, "training_step:plain", {**options, "channels_last": True}),
            *([our_way(PLAIN_CONVOLUTIONS, "fp32", "fp32", fast=False)] if self.device == "cpu" else []),
            our_way(FP32, "fp32", "fp32"),
            our_way(BF16_ATTACK, "fp32", "bf16"),
            our_way(BF16, "bf16", "bf16"),
        ]
        if self.device == "cuda":  # compiling is for GPUs
            ways += [our_way(_compiled(mode), "bf16", "bf16", compile_mode=mode) for mode in COMPILE_MODES]
        return [*ways, *(our_way(name, precision, precision, **standard) for precision, name in STANDARD.items())]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        reference = results[PLAIN]
        checks = []
        for way, found in results.items():
            if way in (PLAIN, LIBRARY, *STANDARD.values()):  # the library's default keeps the best iterate: others
                continue
            if "bf16" not in way:
                checks += equal_losses(f"{way}: losses of its examples less {PLAIN}'s", found, reference)
                step = float(abs(found["step_loss"] - reference["step_loss"]))
                checks.append(Check(f"{way}: loss of the step less {PLAIN}'s", step, MEAN_LOSS_LIMIT))
            far = float(abs(found["accuracy"] - reference["accuracy"]))
            limit = 0.5 if "bf16" in way else 1e-6
            checks.append(Check(f"{way}: accuracy on its examples less {PLAIN}'s, points", far, limit))
        return checks

    def reaches(self) -> list[Reach]:
        return [
            Reach(FP32, SAME, at_least=1.45),
            Reach(BF16, SAME, at_least=2.9),
            Reach(FP32, STANDARD["fp32"], at_most=2.95),
            Reach(BF16, STANDARD["bf16"], at_most=2.7),
            *([Reach(_compiled("cuda-graphs"), LIBRARY, at_least=4.0)] if self.device == "cuda" else []),
        ]

    @property
    def units(self) -> tuple[int, str]:
        return self._batch_size, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.arch} at {self.image_size} px, batches of {self._batch_size}, three steps of 2/3 epsilon. The peer "
            "runs its own training loop; its default keeps the best iterate of the attack, one forward pass more than "
            "use_best 0, which the row that reaches refer to has. It calls .cuda() whatever the machine: on CPUs that "
            "call is neutralised. Its gradient ignores pixels that are black or white; images of half the contrast "
            "keep that out of the comparison. The rows of ours are cumulative: each adds one switch. In theory a PGD-3 "
            "step costs 9 passes where a standard one costs 3."
        )


def _compiled(mode: str) -> str:
    return f"{BF16}, compiled ({mode})"


def ours(
    *,
    checkpoint: str,
    images: str,
    epsilon: float,
    precision: str,
    attack_precision: str,
    device: str,
    compile_mode: str = "",
    fast: bool = True,
) -> Side:
    pixels, labels = load_images(images, device)
    batch = [((pixels * 255).round().to(torch.uint8), labels)]
    compute = Compute(torch.device(device), precision, attack_precision, compile_mode)
    attack = AttackConfig()

    def learner() -> Learner:
        model = load_network(checkpoint, device).to(memory_format=torch.channels_last)
        optimizer = _optimizer(model)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        objective = ObjectiveConfig().build(attack)
        return Learner(model, optimizer, scheduler, objective, ThreatModel("L2", epsilon), compute)

    def step(learner: Learner) -> None:
        with cpu.fast(device) if fast else nullcontext():
            learner.step(batch)

    timed = learner()

    def result() -> Arrays:
        fresh, seen = learner(), []
        forward = fresh._forward
        fresh._forward = lambda points: (seen.append(points), forward(points))[1]  # type: ignore[method-assign]
        if compile_mode == "cuda-graphs":  # a replay must be the first step again, of a network that stands still
            for group in fresh.optimizer.param_groups:
                group["lr"] = 0.0
            for module in fresh.model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.0
            for _ in range(GraphedGradients.WARM_UP + 1):
                step(fresh)
        step(fresh)
        loss = fresh.meter.read()[0].metrics()["train_loss"]
        return _compared(checkpoint, pixels, seen[-1], labels, loss, device)

    return Side(lambda: step(timed), result)


def plain(*, checkpoint: str, images: str, epsilon: float, device: str, channels_last: bool = False) -> Side:
    """The step as one writes it first: the network itself in eval mode, nothing folded."""
    pixels, labels = load_images(images, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    pixels = pixels.contiguous(memory_format=layout)

    def fresh() -> tuple[NormalizedModel, torch.optim.Optimizer]:
        model = load_network(checkpoint, device).to(memory_format=layout)
        return model, _optimizer(model)

    timed = fresh()

    def result() -> Arrays:
        adversarial, loss = plain_step(*fresh(), pixels, labels, epsilon)
        return _compared(checkpoint, pixels, adversarial, labels, float(loss), device)

    return Side(lambda: plain_step(*timed, pixels, labels, epsilon), result)


def plain_step(
    model: NormalizedModel, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """One step of PGD-3 training: its examples and its loss."""
    model.eval()
    delta = torch.zeros_like(pixels)
    for _ in range(3):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels + delta), labels), delta)
        # A gradient of exactly zero, which a trained network has where it is sure, moves nothing.
        delta = delta.detach() + 2 / 3 * epsilon * gradient / _norms(gradient).clamp(min=1e-10)
        delta = delta * (epsilon / _norms(delta)).clamp(max=1)
        delta = (pixels + delta).clamp(0, 1) - pixels
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(pixels + delta), labels)
    loss.backward()
    optimizer.step()
    return pixels + delta, loss.detach()


def madry(*, checkpoint: str, images: str, epsilon: float, use_best: bool, device: str) -> Side:
    """MadryLab's library: its attacker around the same torchvision network, and its own training loop."""
    without_cuda_calls()
    from robustness.attacker import AttackerModel
    from robustness.model_utils import DummyModel
    from robustness.train import _model_loop

    class OnePass(list):
        """A loader of one batch."""

    pixels, labels = load_images(images, device)
    options = SimpleNamespace(
        eps=epsilon,
        custom_eps_multiplier=None,
        random_restarts=0,
        constraint="2",
        attack_lr=2 / 3 * epsilon,
        attack_steps=3,
        random_start=0,
        use_best=int(use_best),
        mixed_precision=False,
    )

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        network = load_network(checkpoint, device)
        statistics = SimpleNamespace(mean=network.mean.flatten(), std=network.std.flatten())
        model = AttackerModel(DummyModel(network.backbone), statistics).to(device)
        return model, _optimizer(model)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        return _model_loop(options, "train", OnePass([(pixels, labels)]), model, optimizer, 0, True, None)[1]

    timed = fresh()

    def result() -> Arrays:
        model, optimizer = fresh()
        attack = {"constraint": "2", "eps": epsilon, "step_size": 2 / 3 * epsilon, "iterations": 3}
        _, adversarial = model.eval()(pixels, target=labels, make_adv=True, use_best=use_best, **attack)
        return _compared(checkpoint, pixels, adversarial, labels, float(step(model, optimizer)), device)

    return Side(lambda: step(*timed), result)


def _compared(
    checkpoint: str, pixels: Tensor, adversarial: Tensor, labels: Tensor, step_loss: float, device: str
) -> Arrays:
    found = outcome(load_network(checkpoint, device), pixels, adversarial, labels)
    return {**found, "step_loss": np.array(step_loss)}


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)


def _norms(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)[:, None, None, None]
