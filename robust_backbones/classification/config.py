"""How a classifier is trained, and how a run of it is executed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from robust_backbones.attacks import AttackConfig
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.data.decoding import ResizedCache
from robust_backbones.data.transforms import AUGMENTATIONS, EvaluationImages
from robust_backbones.errors import InputError, check_choice, check_not_negative, check_positive
from robust_backbones.threat_models import ThreatModel

PAPER_BATCH_SIZE = 512


@dataclass(frozen=True)
class TrainingConfig(EvaluationImages):
    """How a network is trained: same config, network and data, same result. Defaults: the paper's ImageNet recipe."""

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    """Training adversary, as NORM:EPSILON in [0, 1] pixel units; epsilon 0 is standard training."""
    eval_threat_model: ThreatModel | None = None
    """Adversary that robust accuracy is measured against; the training adversary when not given."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Adversary's effort in training."""
    eval_attack: AttackConfig = field(
        default_factory=lambda: AttackConfig(steps=10, relative_step_size=0.25, random_start=True)
    )
    """Adversary's effort in evaluation."""
    epochs: int = 90
    batch_size: int = 512
    """Global: images that one optimiser step sees, over all processes and micro-batches."""
    lr: float = 0.1
    lr_scaling: str = "none"
    """none: the rate is ``lr``; linear: it is ``lr`` x batch_size / 512 (Goyal et al. 2017)."""
    schedule: str = "step"
    """step: a tenth of the rate every ``lr_step`` epochs;
    one_cycle: up from ``lr`` / 25, then to 0, for short runs;
    cosine: up over ``warmup_epochs``, then half a cosine to 0."""
    lr_step: int = 30
    warmup_epochs: float = 0.0
    optimizer: str = "sgd"
    """sgd, or adamw, which leaves biases, norms and scales without weight decay."""
    momentum: float = 0.9
    """Of sgd."""
    beta2: float = 0.999
    """Of adamw."""
    weight_decay: float = 1e-4
    mixup: float = 0.0
    """Alpha of mixup, whose shares are drawn from Beta(alpha, alpha); 0 is off.
    With cutmix each takes half the micro-batches."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off."""
    epsilon_warmup_epochs: float = 0.0
    """Epochs over which epsilon grows linearly to its full size."""
    ema_decay: float = 0.0
    """Decay a step of an exponential moving average of the weights, which is then what is evaluated and written."""
    sync_batch_norm: bool = False
    """Batch statistics over all processes instead of over each one's micro-batch."""
    augmentation: str = "resized_crop"
    """All with a random flip. resized_crop: a crop of random size and shape (ImageNet);
    padded_crop: a crop after padding by 4 px (CIFAR);
    robustness: resized_crop, colour jitter of 0.1 and PCA noise of 0.05, as the paper's library;
    color_jitter: resized_crop and jitter of 0.4;
    heavy: resized_crop, RandAugment and random erasing."""
    progressive_size: int = 0
    """Image size of the first epoch in progressive resizing, which grows over ``progressive_epochs``; 0 is off."""
    progressive_epochs: int = 0
    min_crop_scale: float = 0.08
    """Least share of an image's area that a resized crop keeps."""
    cache_short_side: int = 0
    """Reduce each image once so that its shorter side is this, and keep it in ``--cache``; 0 is off."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (images, perturbations, losses and weights stay float32)."""
    attack_precision: str = ""
    """Of the attack's passes; as ``precision`` when empty."""
    eval_period: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_images: int = 0
    """Evaluate on this many validation images, drawn by ``seed``; 0: on all."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs", "batch_size", "lr", "lr_step", "eval_period")
        check_not_negative(
            self, "epsilon_warmup_epochs", "progressive_size", "progressive_epochs", "cache_short_side", "eval_images"
        )
        check_not_negative(self, "warmup_epochs", "mixup", "cutmix", "momentum", "weight_decay")
        check_choice("schedule", self.schedule, ("step", "one_cycle", "cosine"))
        check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        if self.warmup_epochs and self.schedule != "cosine":
            raise InputError(f"warmup_epochs belong to the cosine schedule, not to {self.schedule}: leave them out")
        warmups = {"warmup_epochs": self.warmup_epochs >= self.epochs}
        warmups["epsilon_warmup_epochs"] = self.epsilon_warmup_epochs > self.epochs
        for name in (name for name, is_too_long in warmups.items() if is_too_long):
            raise InputError(
                f"{name} {getattr(self, name):g} are too many for {self.epochs} epochs: give fewer by "
                f"--{name.replace('_', '-')}, or 0 for none"
            )
        if not 0 <= self.beta2 < 1:
            raise InputError(f"beta2 must be in [0, 1), got {self.beta2:g}")
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        check_choice("lr_scaling", self.lr_scaling, ("none", "linear"))
        self.compute(torch.device("cpu"))  # refuses a precision that it does not know
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be in [0, 1), got {self.ema_decay:g}")
        if not 0 < self.min_crop_scale <= 1:
            raise InputError(f"min_crop_scale is a share of the area, in (0, 1], got {self.min_crop_scale:g}")
        for threat_model in (self.threat_model, self.eval_threat_model or self.threat_model):
            threat_model.check_radius((3, self.image_size or 224, self.image_size or 224))
        if 0 < self.image_size < self.progressive_size:
            raise InputError(f"progressive_size {self.progressive_size} exceeds image_size {self.image_size}")
        if bool(self.progressive_size) != bool(self.progressive_epochs):
            raise InputError("progressive resizing needs both progressive_size and progressive_epochs")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; threat models as text."""
        return {**asdict(self), "threat_model": str(self.threat_model), "eval_threat_model": str(self.evaluated_at)}

    @property
    def evaluated_at(self) -> ThreatModel:
        """The adversary that robust accuracy is measured against."""
        return self.eval_threat_model or self.threat_model

    def compute(self, device: torch.device, compile_mode: str = "") -> Compute:
        return Compute(device, self.precision, self.attack_precision, compile_mode)

    def image_cache(self, folder: Path | None) -> ResizedCache | None:
        """The cache of reduced images in ``folder`` that a run reads through, if the config asks for one."""
        if not self.cache_short_side:
            return None
        if folder is None:
            raise InputError("cache_short_side needs a folder for the reduced images: give --cache")
        return ResizedCache(folder, self.cache_short_side)

    @property
    def learning_rate(self) -> float:
        """The rate that the schedule starts from."""
        return self.lr * (self.batch_size / PAPER_BATCH_SIZE if self.lr_scaling == "linear" else 1)

    def image_size_at(self, epoch: int) -> int:
        """The side of the training images of an epoch (from 0): linear, in multiples of 32 px."""
        if epoch >= self.progressive_epochs:
            return self.image_size
        size = self.progressive_size + (self.image_size - self.progressive_size) * epoch / self.progressive_epochs
        return min(self.image_size, max(32, 32 * round(size / 32)))


@dataclass(frozen=True)
class Execution:
    """How a run is executed; a resumed run may have another."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda (of several processes, each takes its own GPU); say cuda when you submit from a machine without."""
    workers: int = 2
    """Processes that decode and augment images, for each training process; results do not depend on it."""
    micro_batch_size: int = 0
    """Images that a process takes through the network at once; its gradients are added up to the batch. 0: all.
    Batch norms take their statistics over these."""
    checkpoint_minutes: float = 15.0
    """Time between the checkpoints within an epoch; one is always written at its end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_period: int = 50
    """Steps between rows of steps.jsonl, and between looks at the loss."""
    skip_unreadable: bool = False
    """Look at every image first and leave out those that cannot be read, listed in skipped.json; else stop at one."""
    cache: Path | None = None
    """Folder for images reduced to ``cache_short_side``; runs may share it."""
    compile: str = ""
    """torch.compile for GPUs: default, or cuda-graphs, which also launches a step's kernels at once; empty is off."""
    tensorboard: bool = True
    wandb: str = ""
    """Weights & Biases project to log to; empty is none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device must be cpu, cuda or cuda:NUMBER, got {self.device!r}")
        check_positive(self, "keep_checkpoints", "log_period")
        check_not_negative(self, "workers", "micro_batch_size", "checkpoint_minutes")
        if self.compile and self.device == "cpu":
            raise InputError("--compile pays on GPUs only (on CPUs eager mode is faster): leave it out")
