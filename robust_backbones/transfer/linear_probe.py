"""Fixed-feature transfer: linear classifiers on a frozen backbone, the whole grid and all trials in one pass.

A frozen backbone gives every head the same features, so it runs once an image and epoch however many heads there are,
and several backbones share the decoding. What is left a head is a small matrix product (``heads``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import evaluate
from robust_backbones.classification.metrics import accuracy
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset, mix
from robust_backbones.data.transfer_datasets import TransferData
from robust_backbones.data.transforms import AUGMENTATIONS, augmentation, val_transform
from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError
from robust_backbones.models import NormalizedModel, build_backbone
from robust_backbones.runs.distributed import StopRequest, stop_on_signals
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.identity import claim
from robust_backbones.runs.logs import RunLog
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.features import Features, FrozenBackbone
from robust_backbones.transfer.heads import HeadBank, Heads, logistic_regressions
from robust_backbones.transfer.networks import classifier_weights, new_classifier, transferred_spec
from robust_backbones.transfer.protocol import (
    Penalty,
    Selection,
    Setting,
    TransferConfig,
    TransferImages,
    identity,
    select,
    trial_record,
    without_unreadable,
)

MODE = "linear_probe"
SOLVERS = ("sgd", "lbfgs")
BATCH_NORMS = ("eval", "train")
_BATCH = 128
"""Images that go through a backbone in eval mode at once."""


@dataclass(frozen=True)
class ProbeConfig(TransferConfig):
    """The identity of a linear probe. The defaults are the paper's fixed-feature recipe, but for the selection."""

    solver: str = "sgd"
    """sgd: the paper's; lbfgs: logistic regression on features without augmentation, for each of ``penalties``."""
    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Grid of lbfgs: lambda in cross-entropy + lambda / 2 ‖W‖², for features of root mean square 1."""
    epochs: int = 150
    batch_size: int = 64
    lr_step: int = 50
    """A tenth of the rate every so many epochs."""
    momentum: float = 0.9
    augmentation: str = "resized_crop"
    """resized_crop; padded_crop; none: every epoch sees the features of the evaluation's crop, computed once."""
    views: int = 0
    """0: a fresh augmentation of each image in every epoch, as in the paper. K > 0: features of K augmentations are
    computed once, and epochs take them in turn, which is faster and less accurate."""
    batch_norm: str = "eval"
    """eval: the backbone is frozen. train: its batch norms go by each batch's statistics and keep updating their own
    (over the held-out images too), as in the public code; seeds then share the order of the images."""
    image_size: int = 224
    val_resize: int = 256
    """Shorter side of images before the central crop of ``image_size``, in evaluation."""
    min_crop_scale: float = 0.08
    """Least share of an image's area that a resized crop keeps."""
    precision: str = "fp32"
    """Of the backbone: fp32 or bf16. Features and heads are float32."""
    eval_threat_model: ThreatModel | None = None
    """Adversary that the robust accuracy of every trial is measured against; without one it is not measured."""
    eval_attack: AttackConfig = field(
        default_factory=lambda: AttackConfig(steps=10, relative_step_size=0.25, random_start=True)
    )
    """Adversary's effort."""
    eval_images: int = 0
    """Robust accuracy is that of this many test images, drawn by ``data_seed``; 0: of all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "lr_step", "image_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name, choices in (
            ("solver", SOLVERS),
            ("batch_norm", BATCH_NORMS),
            ("augmentation", (*AUGMENTATIONS, "none")),
            ("precision", ("fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        object.__setattr__(self, "penalties", tuple(self.penalties))
        if not self.penalties or not all(math.isfinite(value) and value > 0 for value in self.penalties):
            raise InputError(f"penalties must be one or more numbers > 0, got {self.penalties}")
        for name in ("views", "eval_images"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.val_resize < self.image_size:
            raise InputError(f"val_resize {self.val_resize} is smaller than the crop, image_size {self.image_size}")
        if not 0 < self.min_crop_scale <= 1:
            raise InputError(f"min_crop_scale is a share of the area, in (0, 1], got {self.min_crop_scale:g}")
        if self.batch_norm == "train" and (self.views or self.augmentation == "none" or self.solver == "lbfgs"):
            raise InputError(
                "batch_norm train changes the features at every step: it goes with fresh views and sgd only"
            )

    def to_dict(self) -> dict[str, Any]:
        """As of any transfer; the threat model as text."""
        return {**super().to_dict(), "eval_threat_model": self.eval_threat_model and str(self.eval_threat_model)}

    @property
    def grid(self) -> Sequence[Setting | Penalty]:
        return self.settings if self.solver == "sgd" else [Penalty(value) for value in self.penalties]

    def images(self, data: TransferData) -> TransferImages:
        """What of the data is for what.

        Raises:
            InputError: the data cannot be used.
        """
        batch_size = self.batch_size if self.solver == "sgd" else 1
        return TransferImages(self, data, settings=len(self.grid), batch_size=batch_size)

    @property
    def fixed_views(self) -> int:
        """Views of each image that are computed once; 0 where every epoch has its own."""
        return 1 if self.augmentation == "none" or self.solver == "lbfgs" else self.views


def linear_probe(
    config: ProbeConfig,
    checkpoints: Mapping[str, Checkpoint],
    data: TransferData,
    output: Path,
    *,
    device: torch.device | str = "cpu",
    workers: int = 2,
    checkpoint_minutes: float = 1.0,
    skip_unreadable: bool = False,
) -> list[RunRecord]:
    """Probe every backbone, in one pass over the data, and leave ``output/LABEL/seed_S/`` for every trial.

    There lie ``record.json`` (task ``transfer``; metrics ``clean_accuracy`` and, where there is an adversary,
    ``robust_accuracy``, 0-100, by the data set's metric) and ``checkpoint.pt``, the network with its new classifier. A
    probe that was cut off goes on; a finished one is returned as it is.

    Args:
        checkpoints: a label, the folder's name, for each backbone.
        checkpoint_minutes: time between the states that a probe goes on from, at the ends of epochs.
        skip_unreadable: leave out images that cannot be read, listed in ``output/skipped.json``; else stop at one.

    Raises:
        InputError: data or config that cannot be used; ``output`` holds another run.
        TrainingFailedError: every setting diverged.
        PreemptedError: SIGTERM or SIGUSR1 came; the state is written.
    """
    with stop_on_signals() as stop:
        config.images(data)  # refuses what it cannot use, before anything is written
        defaults = type(config)().to_dict()
        claim(output, identity({"mode": MODE, **config.to_dict()}, checkpoints, data), defaults)
        if skip_unreadable:
            data = without_unreadable(data, output, workers=workers)
        images, compute = config.images(data), Compute(torch.device(device), config.precision)
        probe = _Probe(config, checkpoints, images, output, compute, workers)
        if records := probe.finished():
            return records
        if config.solver == "sgd":
            probe.train(stop, checkpoint_minutes)
        else:
            probe.regress()
        return probe.finish()


def order_of(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the images in an epoch: that which ``train_batches`` gives a data set of this seed and size."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, -1)))


class _Probe:
    def __init__(
        self,
        config: ProbeConfig,
        checkpoints: Mapping[str, Checkpoint],
        images: TransferImages,
        output: Path,
        compute: Compute,
        workers: int,
    ) -> None:
        self.config, self.images, self.output, self.workers = config, images, output, workers
        # What heads are trained on: all images, which counts; and all but those that select.
        self.parts = {"all": torch.arange(len(images.train))}
        if images.selects:
            self.parts["selecting"] = torch.tensor(images.kept)
        self.labels = torch.tensor(images.train.labels, device=compute.device)
        self.heads: dict[str, Sequence[Heads]] = {}
        self._seconds_before, self._started = 0.0, time.monotonic()
        trained = config.batch_norm == "train"
        self.features = Features(checkpoints, compute, trained_statistics=trained, normalize=config.normalize)

    def finished(self) -> list[RunRecord]:
        """The records, if all are there."""
        backbones = self.features.backbones
        paths = [self._folder(backbone, seed) / "record.json" for backbone in backbones for seed in self._seeds]
        return [RunRecord.read(path) for path in paths] if all(path.exists() for path in paths) else []

    @property
    def seconds(self) -> float:
        """What the probe has taken, with what it took before it was cut off."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def held_out(self) -> ClassificationDataset:
        """The images that select."""
        return self.images.train.take(self.images.held_out)

    @property
    def _seeds(self) -> Sequence[int]:
        """Of the trials; the optimum that L-BFGS finds is no matter of luck."""
        return self.config.seeds if self.config.solver == "sgd" else self.config.seeds[:1]

    def _folder(self, backbone: FrozenBackbone, seed: int) -> Path:
        return self.output / backbone.label / f"seed_{seed}"

    def _plain_features(self, images: ClassificationDataset, description: str) -> list[Tensor]:
        """Of images as they are evaluated."""
        config = self.config
        images = images.seen_through(val_transform(config.image_size, resize=config.val_resize))
        return self.features.of(images, batch_size=_BATCH, workers=self.workers, description=description)

    def _view(self, number: int, description: str) -> list[Tensor]:
        """Of one augmentation of all training images."""
        config = self.config
        if config.augmentation == "none":
            return self._plain_features(self.images.train, description)
        transform = augmentation(config.augmentation, config.image_size, min_crop_scale=config.min_crop_scale)
        view = self.images.train.seen_through(transform, epoch=number, seed=config.data_seed)
        if config.batch_norm == "eval":
            return self.features.of(view, batch_size=_BATCH, workers=self.workers, description=description)
        order = self._stream(number)
        of_order = self.features.of(
            view.take(order.tolist()),
            batch_size=config.batch_size,
            workers=self.workers,
            description=description,
            train_statistics=True,
        )
        return [x.new_zeros(len(view), x.shape[1]).index_copy_(0, order.to(x.device), x) for x in of_order]

    def _stream(self, epoch: int) -> Tensor:
        """The images that go through batch norms in train mode, batch by batch; an incomplete last batch is dropped."""
        count = len(self.labels)
        whole = count // self.config.batch_size * self.config.batch_size
        return order_of(self.config.data_seed, epoch, count)[:whole]

    def _orders(self, part: Tensor, epoch: int) -> Tensor:
        """The order of the images of ``part`` for every seed, (S, n)."""
        config = self.config
        if config.batch_norm == "train":  # heads see the batches whose statistics made their features
            stream = self._stream(epoch)
            return stream[torch.isin(stream, part)].expand(len(config.seeds), -1)
        return torch.stack([part[order_of(seed, epoch, len(part))] for seed in config.seeds])

    def train(self, stop: StopRequest, checkpoint_minutes: float) -> None:
        """All epochs of all heads."""
        config = self.config
        banks = {part: [self._bank(backbone) for backbone in self.features.backbones] for part in self.parts}
        self.heads = dict(banks)
        first, rows = self._restore(banks)
        numbers = range(config.fixed_views if first < config.epochs else 0)
        views = [self._view(number, f"view {number + 1}/{len(numbers)}") for number in numbers]
        log = RunLog(self.output, {"epochs": rows})
        last_save = time.monotonic()
        try:
            for epoch in range(first, config.epochs):
                label = f"epoch {epoch + 1}/{config.epochs}"
                features = views[epoch % len(views)] if views else self._view(epoch, label)
                losses = self._train_epoch(banks, epoch, features)
                log.write("epochs", {"epoch": epoch + 1, "step": epoch + 1, **losses})
                last = epoch + 1 == config.epochs
                if stop or last or time.monotonic() - last_save >= 60 * checkpoint_minutes:
                    self._save(banks, epoch + 1, log.rows["epochs"])
                    last_save = time.monotonic()
                    print(f"{label}, {self._remaining(epoch + 1)}", flush=True)
                if stop and not last:
                    raise PreemptedError(
                        f"asked to stop: the state is in {self.output}, and the same command goes on from it"
                    )
        finally:
            log.close()

    def _remaining(self, done: int) -> str:
        seconds = self.seconds * (self.config.epochs - done) / done
        return f"{seconds / 60:.0f} min to go"

    def _bank(self, backbone: FrozenBackbone) -> HeadBank:
        config, spec = self.config, backbone.checkpoint.spec
        layers = [new_classifier(spec, self.images.outputs, seed=seed) for seed in config.seeds]
        device = self.features.compute.device
        return HeadBank(layers, config.seeds, config.settings, momentum=config.momentum, device=device)

    def _train_epoch(
        self, banks: Mapping[str, Sequence[HeadBank]], epoch: int, features: Sequence[Tensor]
    ) -> dict[str, float]:
        """One epoch of every bank; the mean losses over the seeds of those trained on all images, in nats."""
        config = self.config
        losses: dict[str, float] = {}
        for part, images in self.parts.items():
            orders = self._orders(images, epoch).to(self.labels.device)
            for backbone, bank, x in zip(self.features.backbones, banks[part], features, strict=True):
                rate = 0.1 ** (epoch // config.lr_step)
                loss = bank.train_epoch(x, self.labels, orders, batch_size=config.batch_size, rate=rate)
                if part == "all":
                    names = [f"{backbone.label}/{setting}/loss" for setting in config.settings]
                    losses |= dict(zip(names, loss.mean(0).tolist(), strict=True))
        return losses

    @property
    def _state(self) -> Path:
        return self.output / "state.pt"

    def _save(self, banks: Mapping[str, Sequence[HeadBank]], epoch: int, rows: list[dict[str, Any]]) -> None:
        trained = self.config.batch_norm == "train"
        state = {
            "epoch": epoch,
            "rows": rows,
            "seconds": self.seconds,
            "banks": {part: [bank.state_dict() for bank in of_part] for part, of_part in banks.items()},
            "extractors": [b.extractor.state_dict() if trained else {} for b in self.features.backbones],
        }
        with atomic_path(self._state) as temporary:
            torch.save(state, temporary)

    def _restore(self, banks: Mapping[str, Sequence[HeadBank]]) -> tuple[int, list[dict[str, Any]]]:
        """Take over the state of a probe that was cut off: how many epochs are done, and their rows."""
        if not self._state.exists():
            return 0, []
        state = load_tensors(self._state)
        for part, of_part in banks.items():
            for bank, saved in zip(of_part, state["banks"][part], strict=True):
                bank.load_state_dict(saved)
        for backbone, saved in zip(self.features.backbones, state["extractors"], strict=True):
            if saved:
                backbone.extractor.load_state_dict(saved)
        self._seconds_before = state["seconds"]
        print(f"going on from {self._state}: epoch {state['epoch'] + 1}", flush=True)
        return state["epoch"], state["rows"]

    def regress(self) -> None:
        """The optimum of every penalty for every backbone."""
        features = self._plain_features(self.images.train, "features")
        penalties = [Penalty(value) for value in self.config.penalties]
        for part, images in self.parts.items():
            rows = images.to(self.labels.device)
            self.heads[part] = [
                logistic_regressions(x[rows], self.labels[rows], outputs=self.images.outputs, penalties=penalties)
                for x in features
            ]

    def finish(self) -> list[RunRecord]:
        """Measure the trained heads, choose a setting for each backbone, and write the trials of it."""
        # Selection comes first, and test images are read after it: they cannot have a part in it.
        held_out: Sequence[Tensor | None] = [None] * len(self.features.backbones)
        if "selecting" in self.heads:
            held_out = self._plain_features(self.held_out, "held out")
        selections = [self._select(index, features) for index, features in enumerate(held_out)]
        test = self._plain_features(self.images.test, "test")
        records = []
        for backbone, heads, features, selection in zip(
            self.features.backbones, self.heads["all"], test, selections, strict=True
        ):
            scores = self._scores(heads, features, self.images.test)
            chosen = selection or Selection(select(scores), "test", scores)
            setting = next(setting for setting in heads.settings if str(setting) == chosen.selected)
            for seed, trial in zip(self._seeds, range(len(heads.seeds)), strict=True):
                value = scores[chosen.selected][trial]
                if value is None:
                    raise TrainingFailedError(f"{chosen.selected} diverged for {backbone.label}: give lower --lrs")
                classifier = heads.classifier(heads.seeds[trial], setting)
                records.append(self._leave(backbone, seed, classifier, value, chosen))
        self._state.unlink(missing_ok=True)
        return records

    def _select(self, index: int, features: Tensor | None) -> Selection | None:
        """The choice by the held-out images; None where the test images have it."""
        grid = self.config.grid
        if len(grid) == 1:
            return Selection(str(grid[0]), "nothing", {})
        if features is None:
            return None
        scores = self._scores(self.heads["selecting"][index], features, self.held_out)
        return Selection(select(scores), "held_out", scores)

    def _scores(self, heads: Heads, features: Tensor, dataset: ClassificationDataset) -> dict[str, list[float | None]]:
        """Of each setting the accuracy (0-100) of every trial's head; None where it diverged."""
        labels, predicted, finite = torch.tensor(dataset.labels), heads.predict(features).cpu(), heads.finite.tolist()

        def score(trial: int, place: int) -> float | None:
            if not finite[trial][place]:
                return None
            right = labels.bincount((predicted[trial, place] == labels).double())
            return accuracy(right, labels.bincount(), self.images.metric)

        trials = range(len(heads.seeds))
        return {str(setting): [score(trial, place) for trial in trials] for place, setting in enumerate(heads.settings)}

    def _leave(
        self, backbone: FrozenBackbone, seed: int, classifier: nn.Linear, value: float, selection: Selection
    ) -> RunRecord:
        """Write a trial's network and record."""
        config, checkpoint = self.config, backbone.checkpoint
        folder = self._folder(backbone, seed)
        spec = transferred_spec(checkpoint, self.images.outputs, normalize=config.normalize)
        weights = {**backbone.extractor.backbone.state_dict(), **classifier_weights(spec, classifier)}
        write_checkpoint(folder / "checkpoint.pt", spec=spec, state_dict=weights, threat_model=checkpoint.threat_model)
        metrics: dict[str, float | None] = {"clean_accuracy": value}
        if config.eval_threat_model is not None:
            network = build_backbone(spec)
            network.load_state_dict(weights)
            metrics["robust_accuracy"] = self._robust_accuracy(NormalizedModel(network, spec), seed)
        return trial_record(
            folder,
            mode=MODE,
            checkpoint=checkpoint,
            data=self.images,
            metrics=metrics,
            selection=selection,
            seed=seed,
            config=config.to_dict(),
            seconds=self.seconds,
        )

    def _robust_accuracy(self, model: NormalizedModel, seed: int) -> float:
        """Of a trial's whole network, 0-100, by the data set's metric: the adversary sees backbone and head."""
        config, compute = self.config, self.features.compute
        assert config.eval_threat_model is not None
        images = self.images.test.seen_through(val_transform(config.image_size, resize=config.val_resize))
        if config.eval_images:
            images = images.sample(config.eval_images, seed=config.data_seed)
        found = evaluate(
            model.to(compute.device),
            val_batches(images, _BATCH, workers=self.workers),
            config.eval_threat_model,
            config.eval_attack,
            compute,
            generator=torch.Generator(compute.device).manual_seed(seed),
            metric=self.images.metric,
            description=f"attack on seed {seed}",
        )
        return found["robust_accuracy"]
