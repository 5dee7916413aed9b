"""PGD alone: ours against torchattacks and foolbox, on a network that was trained for minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.networks import (
    equal_losses,
    held_out_images,
    judged,
    load_images,
    load_network,
    outcome,
    trained_network,
)
from benchmarks.peers import without_cuda_calls
from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work
from robust_backbones import cpu
from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.classification.compute import PRECISIONS
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.threat_models import ThreatModel

NORMS = {"L2": "ℓ2", "Linf": "ℓ∞"}
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PGD10(Work):
    """PGD of 10 steps on a ResNet-50 at 64 px, in both norms."""

    name: ClassVar[str] = "attack"
    title: ClassVar[str] = "PGD-10 alone"
    on_gpu: ClassVar[bool] = True
    warm_up: ClassVar[int] = 0
    """The check has done it."""

    arch: str = "resnet50"
    image_size: int = 64
    batch_size: int = 32
    images: int = 200
    """On which results are compared."""
    steps: int = 10
    l2: float = 1.0
    """Epsilon of the l-2 ball, pixels in [0, 1]."""
    linf: float = 8 / 255

    def ways(self) -> list[Way]:
        shared = {
            "checkpoint": str(trained_network(self.output, self.arch, self.device)),
            "images": str(held_out_images(self.output, self.images, self.image_size)),
            "batch_size": self.batch_size,
            "steps": self.steps,
        }
        ways = []
        for norm, epsilon in (("L2", self.l2), ("Linf", self.linf)):
            options = {**shared, "norm": norm, "epsilon": epsilon}
            for name, make, peer, more in (
                ("torchattacks", "torchattacks", "torchattacks", {}),
                ("foolbox", "foolbox", "foolbox", {}),
                ("ours fp32", "ours", "", {"precision": "fp32"}),
                ("ours bf16", "ours", "", {"precision": "bf16"}),
            ):
                ways.append(Way(f"{NORMS[norm]}, {name}", f"attack:{make}", {**options, **more}, peer))
        return ways

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        checks = []
        for norm in NORMS.values():
            reference = results[f"{norm}, ours fp32"]
            for name, accuracy in (("torchattacks", 1e-6), ("foolbox", 1e-6), ("ours bf16", 0.5)):
                if (found := results.get(f"{norm}, {name}")) is None:
                    continue
                if "bf16" not in name:
                    what = f"{norm}: losses of {name}'s examples less those of ours in fp32"
                    checks += equal_losses(what, found, reference)
                far = float(abs(found["accuracy"] - reference["accuracy"]))
                checks.append(Check(f"{norm}: robust accuracy, {name} less ours in fp32, points", far, accuracy))
            clean, robust = float(reference["clean"]), float(reference["accuracy"])
            # Else equal accuracies would say nothing.
            checks.append(Check(f"{norm}: robust accuracy {robust:.1f} %, of clean {clean:.1f} %", robust, clean - 5))
        return checks

    def reaches(self) -> list[Reach]:
        return [
            Reach(f"{norm}, ours {precision}", f"{norm}, {peer}", at_least=at_least)
            for norm in NORMS.values()
            for precision, peer, at_least in (
                ("fp32", "torchattacks", 1.25),
                ("fp32", "foolbox", 2.0),
                ("bf16", "torchattacks", 2.2),
                ("bf16", "foolbox", 3.5),
            )
        ]

    @property
    def units(self) -> tuple[int, str]:
        return self.batch_size, "image"

    @property
    def remark(self) -> str:
        return (
            f"{self.arch} at {self.image_size} px, trained for two epochs on synthetic shapes; a step is a fourth of "
            f"epsilon, no random start. Examples are compared on {self.images} held-out images. Numbers below 1e-38, "
            "at which processors are slow, are zero on both sides: they would slow the others more, since ours scales "
            "losses."
        )


def ours(*, precision: str, **options: Any) -> Side:
    def attack_on(model: torch.nn.Module, threat_model: ThreatModel, config: AttackConfig) -> Attack:
        model.to(memory_format=torch.channels_last)
        twin = FoldedTwin(model, PRECISIONS[precision])  # type: ignore[arg-type]

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            twin.refresh()
            with cpu.fast(images.device):
                return pgd(twin, images.contiguous(memory_format=torch.channels_last), labels, threat_model, config)

        return attack

    return _side(attack_on, **options)


def torchattacks(**options: Any) -> Side:
    import torchattacks as library

    def attack_on(model: torch.nn.Module, threat_model: ThreatModel, config: AttackConfig) -> Attack:
        kind = {"L2": library.PGDL2, "Linf": library.PGD}[threat_model.norm]
        step_size = config.relative_step_size * threat_model.epsilon
        return kind(model, eps=threat_model.epsilon, alpha=step_size, steps=config.steps, random_start=False)

    return _side(attack_on, **options)


def foolbox(**options: Any) -> Side:
    without_cuda_calls()
    import foolbox as library

    def attack_on(model: torch.nn.Module, threat_model: ThreatModel, config: AttackConfig) -> Attack:
        kinds = {"L2": library.attacks.L2ProjectedGradientDescentAttack, "Linf": library.attacks.LinfPGD}
        step_size = config.relative_step_size * threat_model.epsilon
        attack = kinds[threat_model.norm](abs_stepsize=step_size, steps=config.steps, random_start=False)
        wrapped = library.PyTorchModel(model, bounds=(0, 1))
        # What it is called for gives three things: raw examples, clipped ones, and whether they succeed.
        return lambda images, labels: attack(wrapped, images, labels, epsilons=threat_model.epsilon)[1]

    return _side(attack_on, **options)


def _side(
    attack_on: Callable[[torch.nn.Module, ThreatModel, AttackConfig], Attack],
    *,
    checkpoint: str,
    images: str,
    batch_size: int,
    steps: int,
    norm: str,
    epsilon: float,
    device: str,
) -> Side:
    # Gradients of confident images fall below 1e-38; that takes processors up to half as long again, whoever asks.
    torch.set_flush_denormal(True)
    pixels, labels = load_images(images, device)
    attack = attack_on(
        load_network(checkpoint, device), ThreatModel(norm, epsilon), AttackConfig(steps=steps, relative_step_size=0.25)
    )
    reference = load_network(checkpoint, device)

    def result() -> Arrays:
        batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
        found = outcome(reference, pixels, torch.cat([attack(*batch) for batch in batches]), labels)
        clean = judged(reference, pixels.cpu().numpy(), labels)[1]
        return {**found, "clean": torch.tensor(clean).numpy()}

    return Side(lambda: attack(pixels[:batch_size], labels[:batch_size]), result)
