"""The training run of a classifier: if interrupted at any moment and resumed, it ends as if it had never stopped."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.utils.data import DataLoader

from robust_backbones.checkpoint.format import sha256, write_checkpoint
from robust_backbones.classification.checkpoints import CheckpointFolder
from robust_backbones.classification.compute import Compute, available
from robust_backbones.classification.config import PAPER_BATCH_SIZE, Execution, TrainingConfig
from robust_backbones.classification.engine import Learner, Totals, evaluate, train_one_epoch
from robust_backbones.cpu.batch_norm import synchronize_batch_norms
from robust_backbones.data.batches import check_fills_batch, steps_per_epoch, train_batches, val_batches
from robust_backbones.data.datasets import ClassificationDataset, skip_list
from robust_backbones.data.transforms import augmentation, mixing
from robust_backbones.errors import DivergedError, PreemptedError, plural
from robust_backbones.models import BackboneSpec, NormalizedModel, fed_as
from robust_backbones.runs.clock import RunClock, duration
from robust_backbones.runs.distributed import Processes, join_processes, local_device
from robust_backbones.runs.folders import claimed
from robust_backbones.runs.logs import RunLog, read_rows
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals


@dataclass(frozen=True)
class TrainingTask:
    """What a run trains, and on which data."""

    name: str
    """``RunRecord.task``."""
    dataset: str
    train: ClassificationDataset
    val: ClassificationDataset
    """Opened with the transform of evaluation; it has the classes of ``train``."""
    spec: BackboneSpec
    build: Callable[[], NormalizedModel]
    """The network to start from."""
    parameter_groups: Callable[[NormalizedModel], list[dict[str, Any]]]
    """The optimiser's groups, each with its own learning rate; the first one's is shown."""
    identity: dict[str, Any]
    """What distinguishes the run from others, besides its config; plain values."""
    backbone: dict[str, Any]
    """``RunRecord.backbone``."""
    threat_model: str | None
    """``RunRecord.threat_model``: that of pre-training."""
    metric: str = "top1"
    """The accuracy metric on ``val``: one of ``metrics.METRICS``."""
    keep_best: bool = True
    """Also keep the epoch that is best on ``val``; must be False if ``val`` has test images."""
    stylize: float = 0.0
    """Strength by which ``data.stylization.stylize`` changes training batches."""


def train(
    config: TrainingConfig, task: TrainingTask, output: str | Path, execution: Execution = Execution()
) -> RunRecord:
    """Train a classifier in the folder ``output``, or resume the run that was interrupted there.

    ``output`` gets ``config.json``; ``steps.jsonl``, ``metrics.jsonl`` (a row an epoch) and ``tensorboard/`` as it
    runs; ``checkpoints/`` with all that resuming needs; ``checkpoint.pt`` and ``best.pt`` (the weights of the last
    epoch, and of the evaluated one with the highest robust accuracy); ``record.json`` at the end. Under torchrun each
    process calls this.

    Returns:
        The record; its metrics are ``clean_accuracy`` and ``robust_accuracy``, 0-100, with ``best/`` those of best.pt.

    Raises:
        InputError: the data cannot be used, or ``output`` holds another run.
        DivergedError: the loss is not finite, or far above that of chance.
        TrainingFailedError: a file could not be written.
        PreemptedError: SIGTERM or SIGUSR1 was received; the state is saved.
    """
    available(execution.device)
    device = local_device(execution.device)
    with (
        join_processes(device) as processes,
        stop_on_signals() as stop,
        # Dropout draws from the global generators: lend them a seed of the run's own.
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(config.seed * 1_000_003 + processes.rank)
        compute = config.compute(device, execution.compile)
        return _Run(config, task, Path(output), execution, compute, processes, stop).run()


_ACCURACIES = ("clean_accuracy", "robust_accuracy")


@dataclass
class _Progress:
    """The progress of a run: whole epochs, steps of the current one, and their results."""

    epoch: int = 0
    step: int = 0
    totals: Totals = field(default_factory=Totals)
    """Of the current epoch."""
    best: dict[str, float] = field(default_factory=dict)
    """The accuracies of the epoch with the highest robust one."""


@dataclass
class _Run:
    """One process's part in one run."""

    config: TrainingConfig
    task: TrainingTask
    output: Path
    execution: Execution
    compute: Compute
    processes: Processes
    stop: StopRequest

    def __post_init__(self) -> None:
        config, execution, processes = self.config, self.execution, self.processes
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", execution.keep_checkpoints)
        # the first one's transform changes
        self.train_data, self.val_data = copy.copy(self.task.train), self.task.val
        self.steps = self._count_steps()  # of an epoch
        self.micro_batch_size = execution.micro_batch_size or max(1, config.batch_size // processes.size)
        self.accumulate = config.batch_size // (self.micro_batch_size * processes.size)
        self.progress = _Progress()
        self.skipped: list[str] = []
        self._loader(epoch=0, first_step=0)  # refuses batches that do not divide, before anything is written

    def _count_steps(self) -> int:
        check_fills_batch(self.task.dataset, len(self.train_data), self.config.batch_size)
        return steps_per_epoch(self.train_data, self.config.batch_size)

    def run(self) -> RunRecord:
        settings = {**self.config.to_dict(), **self.task.identity}
        defaults = fed_as(type(self.config)(), BackboneSpec()).to_dict()
        with claimed(self.output, settings, defaults, processes=self.processes) as finished:
            return RunRecord.read(self.output / "record.json") if finished else self._train(settings)

    def _train(self, settings: dict[str, Any]) -> RunRecord:
        if self.execution.skip_unreadable:
            self._skip_unreadable()
        self.clock = RunClock(self.output)
        self.learner = self._build()
        rows = self._resume()
        self._print(self._plan())
        self.log = RunLog(
            self.output,
            rows,
            tensorboard=self.execution.tensorboard and self.processes.is_main,
            wandb_project=self.execution.wandb if self.processes.is_main else "",
            config=settings,
        )
        self._last_save = time.monotonic()
        try:
            for epoch in range(self.progress.epoch, self.config.epochs):
                self._run_epoch(epoch)
        finally:
            self.log.close()
        return self._write_record()

    def _skip_unreadable(self) -> None:
        """Leave out the images that cannot be read."""
        path, parts = self.output / "skipped.json", {"train": self.train_data, "val": self.val_data}
        found = skip_list(path, parts, workers=self.execution.workers) if self.processes.is_main else None
        skipped = self.processes.broadcast(found)
        self.train_data = self.train_data.without(skipped["train"])
        self.val_data = self.val_data.without(skipped["val"])
        self.steps = self._count_steps()
        self.skipped = [name for names in skipped.values() for name in names]
        where = f", see {path}" if self.skipped else ""
        self._print(f"left out, unreadable: {plural(len(self.skipped), 'image')}{where}")

    def _build(self) -> Learner:
        config, device = self.config, self.compute.device
        model = self.compute.place(self.task.build())
        if config.sync_batch_norm:
            model = synchronize_batch_norms(model, device)
        optimizer = _optimizer(config, self.task.parameter_groups(model))
        return Learner(
            model,
            optimizer,
            _scheduler(config, optimizer, self.steps),
            config.objective.build(config.attack),
            config.threat_model,
            self.compute,
            epsilon_warmup_steps=round(config.epsilon_warmup_epochs * self.steps),
            ema_decay=config.ema_decay,
            stylize=self.task.stylize,
            mix=mixing(config.mixup, config.cutmix, self.task.spec.num_classes),
            seed=config.seed,
            processes=self.processes,
        )

    def _resume(self) -> dict[str, list[dict[str, Any]]]:
        """Continue from the newest checkpoint that can be read, if any; returns the rows logged up to it."""
        found = self.checkpoints.newest(self.processes)
        if found is None:
            return {"steps": [], "metrics": []}
        path, content, problems = found
        for problem in problems:
            self._print(f"warning: {problem}; going back to the checkpoint before it")
        self.learner.load_state_dict(content["learner"])
        progress = content["progress"]
        self.clock.resume(progress.pop("seconds", None))
        self.progress = _Progress(**progress | {"totals": Totals(**progress["totals"])})
        self._print(f"resuming from {path}: epoch {self.progress.epoch + 1}, step {self.progress.step}")
        if (before := len(content["learner"]["processes"])) != self.processes.size:
            self._print(
                f"the run was started by {plural(before, 'process')} and is resumed by {self.processes.size}: from "
                "here on it draws other random numbers than the unbroken run"
            )
        if "rows" in content:  # an older checkpoint
            return content["rows"]
        return {
            "steps": read_rows(self.output, "steps", lambda row: row["step"] <= self.learner.step_count),
            "metrics": read_rows(self.output, "metrics", lambda row: row["epoch"] <= self.progress.epoch),
        }

    def _plan(self) -> str:
        config, size = self.config, self.processes.size
        plan = (
            f"batch {config.batch_size} = {plural(size, 'process')} x {self.accumulate} x "
            f"{plural(self.micro_batch_size, 'image')}; learning rate {config.learning_rate:g}"
        )
        if self.task.name == "pretrain" and config.optimizer == "sgd":
            scaled = 0.1 * config.batch_size / PAPER_BATCH_SIZE
            plan += f" (the paper's 0.1 at batch 512 would scale to {scaled:.3g} here)"
        return plan + "".join(f"\n{warning}" for warning in config.crop_warnings())

    def _run_epoch(self, epoch: int) -> None:
        config, progress = self.config, self.progress
        label = f"epoch {epoch + 1}/{config.epochs}"
        clock = time.perf_counter()
        seconds, images_before = 0.0, progress.totals.images

        def on_log(step: int, totals: Totals) -> None:
            nonlocal clock, seconds
            now = time.perf_counter()
            elapsed, clock = now - clock, now
            row = {
                "epoch": epoch + 1,
                "step": self.learner.step_count,
                "lr": self.learner.rate,
                "epsilon": self.learner.epsilon,
                **totals.metrics(),
                "images_per_second": totals.images / elapsed,
            }
            progress.step = step
            progress.totals += totals
            seconds += elapsed
            self._write_row("steps", row)
            stop = any(self.processes.gather(bool(self.stop)))
            due = time.monotonic() - self._last_save > 60 * self.execution.checkpoint_minutes
            if self.processes.broadcast(due) or stop:
                path = self._save()
                self._print(f"{label}, step {step}/{self.steps}: {_summary(row, config)}, {self._remaining()}")
                clock = time.perf_counter()
                if stop:
                    raise PreemptedError(f"asked to stop: the state is in {path}, and the same command resumes from it")

        try:
            train_one_epoch(
                self.learner,
                self._loader(epoch=epoch, first_step=progress.step),
                steps=self.steps,
                first_step=progress.step,
                accumulate=self.accumulate,
                log_period=self.execution.log_period,
                on_log=on_log,
                # Processes must stop at the same step: several look only where all call on_log.
                stop=(lambda: self.stop) if self.processes.size == 1 else (lambda: False),
                classes=self.task.spec.num_classes,
                description=label,
            )
        except DivergedError as error:
            raise DivergedError(
                f"{label}: {error}; the last good checkpoint is {self.checkpoints.last_good()}; "
                "give a lower learning rate and another --output"
            ) from None
        row = {"epoch": epoch + 1, "step": self.learner.step_count, **progress.totals.metrics()}
        if seconds:
            row["images_per_second"] = (progress.totals.images - images_before) / seconds
        if epoch + 1 == config.epochs or (epoch + 1) % config.eval_period == 0:
            row |= self._evaluate(f"{label} evaluate")
        self._write_row("metrics", row)
        progress.epoch, progress.step, progress.totals = epoch + 1, 0, Totals()
        is_best = self.task.keep_best and row.get("robust_accuracy", -1.0) > progress.best.get("robust_accuracy", -1.0)
        # The checkpoint to resume from comes last: a run that resumes does not write the others of this epoch again.
        self._write_weights("checkpoint.pt")
        if is_best:
            progress.best = {name: row[name] for name in _ACCURACIES}
            self._write_weights("best.pt")
        self._save()
        self._print(f"{label}: {_summary(row, config)}" + f", {self._remaining()}" * (epoch + 1 < config.epochs))

    def _loader(self, *, epoch: int, first_step: int) -> DataLoader:
        config = self.config
        self.train_data.transform = augmentation(
            config.augmentation,
            config.image_size_at(epoch),
            min_crop_scale=config.min_crop_scale,
            interpolation=config.interpolation,
        )
        return train_batches(
            self.train_data,
            batch_size=config.batch_size,
            micro_batch_size=self.micro_batch_size,
            epoch=epoch,
            first_step=first_step,
            rank=self.processes.rank,
            world_size=self.processes.size,
            workers=self.execution.workers,
        )

    def _evaluate(self, description: str) -> dict[str, float]:
        config, processes = self.config, self.processes
        images = self.val_data.sample(config.eval_images, seed=config.seed) if config.eval_images else self.val_data
        rank, size, workers = processes.rank, processes.size, self.execution.workers
        return evaluate(
            self.learner.evaluated,
            val_batches(images, self.micro_batch_size, rank=rank, world_size=size, workers=workers),
            config.evaluated_at,
            config.eval_attack,
            # In float16 small gradients vanish, and a network would look more robust than it is.
            replace(self.compute, precision="fp32") if config.precision == "fp16" else self.compute,
            generator=torch.Generator(self.compute.device).manual_seed(config.seed + processes.rank),
            processes=processes,
            metric=self.task.metric,
            description=description,
        )

    def _remaining(self) -> str:
        """The estimated time for the rest of the run, at its pace so far."""
        done = self.progress.epoch * self.steps + self.progress.step
        seconds = self.clock.seconds * (self.config.epochs * self.steps - done) / done
        return f"{duration(seconds)} to go"

    def _save(self) -> Path:
        step, learner = self.learner.step_count, self.learner.state_dict()  # all processes take part
        if self.processes.is_main:
            self.checkpoints.write(step, {"learner": learner, "progress": asdict(self.progress)})
            self.clock.save()
        self._last_save = time.monotonic()
        return self.checkpoints.path(step)

    def _write_weights(self, name: str) -> None:
        if self.processes.is_main:
            path, weights, task = self.output / name, self.learner.evaluated.backbone.state_dict(), self.task
            threat_model, classes = self.config.threat_model, task.train.classes
            with self.checkpoints.guard(path):
                write_checkpoint(path, spec=task.spec, state_dict=weights, threat_model=threat_model, classes=classes)

    def _write_row(self, name: str, row: dict[str, Any]) -> None:
        if self.processes.is_main:
            with self.checkpoints.guard(self.output / f"{name}.jsonl"):
                self.log.write(name, row)

    def _print(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)

    def _write_record(self) -> RunRecord:
        last = self.processes.broadcast(self.log.rows["metrics"][-1] if self.processes.is_main else {})
        metrics = {name: last[name] for name in _ACCURACIES}
        if self.task.keep_best:
            metrics |= {f"best/{name}": self.progress.best[name] for name in metrics}
        files = [path for name in ("checkpoint.pt", "best.pt") if (path := self.output / name).is_file()]
        record = RunRecord(
            run_id=self.output.name,
            task=self.task.name,
            backbone=self.task.backbone | {f"{path.stem}_sha256": sha256(path) for path in files},
            threat_model=self.task.threat_model,
            dataset=self.task.dataset,
            metrics=metrics,
            seed=self.config.seed,
            config=self.config.to_dict()
            | {"processes": self.processes.size, "micro_batch_size": self.micro_batch_size}
            | ({"skipped_images": len(self.skipped)} if self.skipped else {}),
            seconds=self.clock.seconds,
        )
        if self.processes.is_main:
            record.write(self.output / "record.json")
        return record


def _optimizer(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """With the learning rate and weight decay of the config, unless a group has its own."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    decays = {True: config.weight_decay, False: 0.0}
    parts = [
        {**group, "params": params, "weight_decay": decay}
        for group in groups
        for is_matrix, decay in decays.items()
        if (params := [one for one in group["params"] if (one.ndim > 1) == is_matrix])
    ]
    return torch.optim.AdamW(parts, lr=config.learning_rate, betas=(0.9, config.beta2))


def _scheduler(config: TrainingConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler:
    """The learning rate schedule, stepped once per batch."""
    if config.schedule == "step":
        return StepLR(optimizer, config.lr_step * steps_per_epoch)
    if config.schedule == "cosine":
        warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

        return LambdaLR(optimizer, share)
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, rates, total_steps=config.epochs * steps_per_epoch + 1, cycle_momentum=False)


def _summary(row: dict[str, Any], config: TrainingConfig) -> str:
    text = f"loss {row['train_loss']:.3f}, train accuracy {row['train_accuracy']:.1f} %"
    if "clean_accuracy" in row:
        text += (
            f", validation accuracy clean {row['clean_accuracy']:.1f} %, "
            f"robust ({config.evaluated_at}) {row['robust_accuracy']:.1f} %"
        )
    return text + (f", {row['images_per_second']:.0f} img/s" if "images_per_second" in row else "")
