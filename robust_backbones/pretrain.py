"""Robust pre-training of a classifier, resumable at every epoch: the first arrow of the whole path."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoints import load_tensors, write_checkpoint
from robust_backbones.data.folders import (
    ClassificationFolder,
    train_loader,
    train_transform,
    val_loader,
    val_transform,
)
from robust_backbones.engine import Compute, evaluate, train_one_epoch
from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.records import RunRecord, write_json, write_jsonl
from robust_backbones.threat_models import ThreatModel

SCHEDULES = ("step", "one_cycle")


@dataclass(frozen=True)
class PretrainConfig:
    """The identity of a run: same config, same data, same result. The defaults are the paper's ImageNet recipe."""

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    """Training adversary, as NORM:EPSILON in [0, 1] pixel units; epsilon 0 is standard training."""
    eval_threat_model: ThreatModel | None = None
    """Adversary that robust accuracy is measured against; the training adversary when not given."""
    arch: str = "resnet50"
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Adversary's effort in training."""
    eval_attack: AttackConfig = field(
        default_factory=lambda: AttackConfig(steps=10, relative_step_size=0.25, random_start=True)
    )
    """Adversary's effort in evaluation."""
    epochs: int = 90
    batch_size: int = 512
    """Global: images that one optimiser step sees."""
    lr: float = 0.1
    """Learning rate at ``batch_size``; nothing scales it behind your back."""
    schedule: str = "step"
    """step: a tenth of the rate every ``lr_step`` epochs; one_cycle: up from ``lr`` / 25, then to 0, for short runs."""
    lr_step: int = 30
    momentum: float = 0.9
    weight_decay: float = 1e-4
    image_size: int = 224
    val_resize: int = 256
    """Shorter side of validation images before the central crop of ``image_size``."""
    min_crop_scale: float = 0.08
    """Least share of an image's area that a training crop keeps."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast; images, perturbations, losses and weights stay float32)."""
    eval_period: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "lr_step", "image_size", "eval_period"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.arch not in ARCHITECTURES:
            raise InputError(f"unknown architecture {self.arch!r}: choose one of {', '.join(ARCHITECTURES)}")
        if not 0 < self.min_crop_scale <= 1:
            raise InputError(f"min_crop_scale is a share of the area, in (0, 1], got {self.min_crop_scale:g}")
        if self.val_resize < self.image_size:
            raise InputError(f"val_resize {self.val_resize} is smaller than the crop, image_size {self.image_size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; threat models as NORM:EPSILON."""
        evaluated = self.eval_threat_model or self.threat_model
        return {**asdict(self), "threat_model": str(self.threat_model), "eval_threat_model": str(evaluated)}


@dataclass
class _State:
    """What an unfinished run keeps between epochs."""

    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def pretrain(
    config: PretrainConfig, data: Path, output: Path, *, device: torch.device | str = "cpu", workers: int = 2
) -> RunRecord:
    """Train on ``data/train``, evaluate on ``data/val``, leave checkpoint.pt, metrics.jsonl and record.json in output.

    A run that was cut off goes on from its last whole epoch; a finished one is returned as it is.

    Raises:
        InputError: data that cannot be used; ``output`` holds a run of another config.
    """
    config = replace(config, eval_threat_model=config.eval_threat_model or config.threat_model)
    assert config.eval_threat_model is not None
    compute = Compute(torch.device(device), config.precision)
    train_data = ClassificationFolder(
        data / "train", train_transform(config.image_size, min_crop_scale=config.min_crop_scale), seed=config.seed
    )
    val_data = ClassificationFolder(data / "val", val_transform(config.image_size, resize=config.val_resize))
    if train_data.classes != val_data.classes:
        raise InputError(f"{data / 'train'} and {data / 'val'} hold different classes: give both the same folders")
    steps_per_epoch = len(train_data) // config.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"{data / 'train'} has {len(train_data)} images, less than one batch: lower --batch-size")
    if _claim(output, {**config.to_dict(), "data": data.name}):
        return RunRecord.read(output / "record.json")

    spec = BackboneSpec(config.arch, len(train_data.classes))
    model = NormalizedModel(build_backbone(spec, seed=config.seed), spec)
    model.to(device=compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = _scheduler(config, optimizer, steps_per_epoch)
    state = _State()
    checkpoint_path = output / "checkpoint.pt"
    if checkpoint_path.exists():
        state = _restore(checkpoint_path, model, optimizer, scheduler)
        print(f"resuming at epoch {state.epoch + 1} of {config.epochs}")

    for epoch in range(state.epoch, config.epochs):
        start = time.perf_counter()
        generator = torch.Generator(compute.device).manual_seed(config.seed + epoch)
        label = f"epoch {epoch + 1}/{config.epochs}"
        row: dict[str, float] = {"epoch": epoch + 1, "lr": float(scheduler.get_last_lr()[0])}
        batches = train_loader(train_data, config.batch_size, epoch=epoch, workers=workers)
        row |= train_one_epoch(
            model,
            batches,
            optimizer,
            scheduler,
            config.threat_model,
            config.attack,
            compute,
            generator=generator,
            description=label,
        )
        if not math.isfinite(row["train_loss"]):  # before anything good on disk is overwritten
            raise InputError(
                f"{label}: the loss is not finite; choose another --output and a lower --lr than {config.lr:g}"
            )
        trained = time.perf_counter()
        row["images_per_second"] = steps_per_epoch * config.batch_size / (trained - start)
        last = epoch + 1 == config.epochs
        if last or (epoch + 1) % config.eval_period == 0:
            row |= evaluate(
                model,
                val_loader(val_data, config.batch_size, workers=workers),
                config.eval_threat_model,
                config.eval_attack,
                compute,
                generator=torch.Generator(compute.device).manual_seed(config.seed),
                description=f"{label} evaluate",
            )
        state.history.append(row)
        state.epoch, state.seconds = epoch + 1, state.seconds + time.perf_counter() - start
        training = asdict(state)
        if not last:  # a finished file is half the size without the optimiser
            training |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        write_checkpoint(
            checkpoint_path,
            spec=spec,
            state_dict=model.backbone.state_dict(),
            threat_model=config.threat_model,
            training=training,
        )
        write_jsonl(output / "metrics.jsonl", state.history)
        print(f"{label}: " + _summary(row, config.eval_threat_model), flush=True)

    record = RunRecord(
        run_id=output.name,
        task="pretrain",
        backbone=spec.to_dict(),
        threat_model=str(config.threat_model),
        dataset=data.name,
        metrics={name: state.history[-1][name] for name in ("clean_accuracy", "robust_accuracy")},
        seed=config.seed,
        config=config.to_dict(),
        seconds=state.seconds,
    )
    record.write(output / "record.json")
    return record


def _claim(output: Path, identity: dict[str, Any]) -> bool:
    """Make ``output`` this run's folder; True when the run has already finished there.

    Raises:
        InputError: the folder holds something else.
    """
    path = output / "config.json"
    if path.exists():
        held = json.loads(path.read_text())
        if different := sorted(key for key in identity.keys() | held.keys() if identity.get(key) != held.get(key)):
            raise InputError(
                f"{output} holds another run (it differs in {', '.join(different)}): choose another --output"
            )
        return (output / "record.json").exists()
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no run of ours: choose another --output")
    write_json(path, identity)
    return False


def _scheduler(
    config: PretrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate, stepped once a batch."""
    if config.schedule == "one_cycle":
        steps = config.epochs * steps_per_epoch
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps + 1, cycle_momentum=False)
    return torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step * steps_per_epoch)


def _restore(
    path: Path,
    model: NormalizedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> _State:
    """Load a run's weights and training state in place; one cut off after its last epoch has no optimiser state."""
    content = load_tensors(path)
    model.backbone.load_state_dict(content["state_dict"])
    training = dict(content["training"])
    if "optimizer" in training:
        optimizer.load_state_dict(training.pop("optimizer"))
        scheduler.load_state_dict(training.pop("scheduler"))
    return _State(**training)


def _summary(row: dict[str, float], threat_model: ThreatModel) -> str:
    text = f"loss {row['train_loss']:.3f}, train accuracy {row['train_accuracy']:.1f} %"
    if "clean_accuracy" in row:
        text += (
            f", validation accuracy clean {row['clean_accuracy']:.1f} %, "
            f"robust ({threat_model}) {row['robust_accuracy']:.1f} %"
        )
    return text + f", {row['images_per_second']:.0f} img/s"
