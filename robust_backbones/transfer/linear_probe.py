"""Fixed-feature transfer: linear classifiers on a frozen backbone, the whole grid and all trials in one pass.

A frozen backbone gives every head the same features, so it runs once per image and epoch for any number of heads, and
several backbones share the decoding. The remaining work per head is a small matrix product (``heads``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_backbones.checkpoint.format import Checkpoint, save_tensors, write_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.compute import Compute, available
from robust_backbones.classification.engine import evaluate
from robust_backbones.classification.metrics import accuracy
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.data.transfer_datasets import TransferData
from robust_backbones.data.transforms import augmentation
from robust_backbones.errors import PreemptedError, TrainingFailedError
from robust_backbones.models import BackboneSpec, NormalizedModel, backbone_with, fed_as
from robust_backbones.runs.clock import RunClock
from robust_backbones.runs.folders import claimed, tell_finished
from robust_backbones.runs.logs import RunLog, read_rows
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals
from robust_backbones.transfer.config import Penalty, ProbeConfig
from robust_backbones.transfer.features import EVALUATION_BATCH, Features
from robust_backbones.transfer.heads import HeadBank, Heads, logistic_regressions
from robust_backbones.transfer.networks import classifier_weights, new_classifier, transferred_spec
from robust_backbones.transfer.protocol import (
    Backbones,
    Selection,
    TransferImages,
    open_data,
    order_of,
    read_backbones,
    select,
    settings_of,
    trial_record,
    without_unreadable,
)

MODE = "linear_probe"


def linear_probe(
    backbones: Backbones,
    data: TransferData | str | Path,
    output: str | Path,
    config: ProbeConfig = ProbeConfig(),
    *,
    device: torch.device | str = "cpu",
    workers: int = 2,
    checkpoint_minutes: float = 1.0,
    skip_unreadable: bool = False,
) -> list[RunRecord]:
    """Probe every backbone, in one pass over the data; the defaults are the recipe of Salman et al. 2020, appendix A.

    ``output/LABEL/seed_S/`` gets, for every trial, ``record.json`` (task ``transfer``; metrics ``clean_accuracy`` and,
    with an adversary, ``robust_accuracy``, 0-100, by the data set's metric) and ``checkpoint.pt``, the network with its
    new classifier. An interrupted probe resumes; a finished one is returned unchanged.

    Args:
        backbones: checkpoints or their files, in a dict by label (the folder's name) or in a list.
        data: an opened data set, or a folder with train/ and test/.
        checkpoint_minutes: time between the states saved for resuming, at ends of epochs.
        skip_unreadable: leave out images that cannot be read, listed in ``output/skipped.json``, instead of stopping.

    Raises:
        InputError: data or config that cannot be used; ``output`` holds another run.
        TrainingFailedError: every setting diverged.
        PreemptedError: SIGTERM or SIGUSR1 was received; the state is saved.
    """
    checkpoints, opened, output = read_backbones(backbones), open_data(data), Path(output)
    config = fed_as(config, *(checkpoint.spec for checkpoint in checkpoints.values()))
    print("".join(f"{warning}\n" for warning in config.crop_warnings()), end="", flush=True)
    batch_size = config.batch_size if config.solver == "sgd" else 1
    usable = partial(TransferImages, config, settings=len(config.grid), batch_size=batch_size)
    images = usable(opened)  # refuses what it cannot use, before anything is written
    compute = Compute(available(device), config.precision)
    settings = settings_of({"mode": MODE, **config.to_dict()}, checkpoints, opened)
    defaults = fed_as(type(config)(), BackboneSpec()).to_dict()
    with stop_on_signals() as stop, claimed(output, settings, defaults):
        if skip_unreadable:
            images = usable(without_unreadable(opened, output, workers=workers))
        probe = _Probe(config, checkpoints, compute, images, output, workers)
        if records := probe.finished():
            tell_finished(output)
            probe.state.unlink(missing_ok=True)  # of one that was killed between its last record and its end
            return records
        if config.solver == "sgd":
            probe.train(stop, checkpoint_minutes)
        else:
            probe.regress()
        return probe.finish()


class _Probe:
    def __init__(
        self,
        config: ProbeConfig,
        checkpoints: Mapping[str, Checkpoint],
        compute: Compute,
        images: TransferImages,
        output: Path,
        workers: int,
    ) -> None:
        self.config, self.checkpoints, self.compute, self.images = config, checkpoints, compute, images
        self.output, self.workers, self.state = output, workers, output / "state.pt"
        self.trains_statistics = config.batch_norm == "train"
        # What heads are trained on: all images, which counts; and all but those that select.
        self.parts = {"all": torch.arange(len(images.train))}
        if images.selects:
            self.parts["selecting"] = torch.tensor(images.kept)
        self.held_out = images.train.take(images.held_out)
        self.labels = torch.tensor(images.train.labels, device=compute.device)
        self.heads: dict[str, Sequence[Heads]] = {}
        # The optimum that L-BFGS finds is no matter of luck.
        self.seeds = config.seeds if config.solver == "sgd" else config.seeds[:1]
        self.clock = RunClock(output)

    @cached_property
    def features(self) -> Features:
        """With the networks, which a finished probe does not need."""
        options = {"trained_statistics": self.trains_statistics, "normalize": self.config.normalize}
        return Features(self.checkpoints, self.compute, **options)

    def finished(self) -> list[RunRecord]:
        """The records, if all are there."""
        paths = [self._folder(label, seed) / "record.json" for label in self.checkpoints for seed in self.seeds]
        return [RunRecord.read(path) for path in paths] if all(path.exists() for path in paths) else []

    def _folder(self, label: str, seed: int) -> Path:
        return self.output / label / f"seed_{seed}"

    def _plain(self, images: ClassificationDataset) -> ClassificationDataset:
        """Images with the preprocessing of evaluation."""
        return images.seen_through(self.config.val_transform())

    def _features(self, images: ClassificationDataset, description: str, **options: Any) -> list[Tensor]:
        return self.features.of(images, workers=self.workers, description=description, **options)

    def _view(self, number: int, description: str) -> list[Tensor]:
        """Features of one augmentation of all training images."""
        config, images = self.config, self.images.train
        if config.augmentation == "none":
            return self._features(self._plain(images), description)
        transform = augmentation(
            config.augmentation,
            config.image_size,
            min_crop_scale=config.min_crop_scale,
            interpolation=config.interpolation,
        )
        view = images.seen_through(transform, epoch=number, seed=config.data_seed)
        if not self.trains_statistics:
            return self._features(view, description)
        order = self._stream(number)
        in_order = self._features(
            view.take(order.tolist()), description, batch_size=config.batch_size, train_statistics=True
        )
        return [x.new_zeros(len(view), x.shape[1]).index_copy_(0, order.to(x.device), x) for x in in_order]

    def _stream(self, epoch: int) -> Tensor:
        """Images for batch norms in train mode, batch by batch; an incomplete last batch is dropped."""
        count = len(self.labels)
        return order_of(self.config.data_seed, epoch, count)[: count - count % self.config.batch_size]

    def _orders(self, part: Tensor, epoch: int) -> Tensor:
        """The order of the images of ``part`` for every seed, (S, n)."""
        if self.trains_statistics:  # heads see the batches whose statistics made their features
            stream = self._stream(epoch)
            return stream[torch.isin(stream, part)].expand(len(self.seeds), -1)
        return torch.stack([part[order_of(seed, epoch, len(part))] for seed in self.seeds])

    def train(self, stop: StopRequest, checkpoint_minutes: float) -> None:
        """All epochs of all heads."""
        config = self.config
        banks = {part: [self._bank(one.spec) for one in self.checkpoints.values()] for part in self.parts}
        self.heads = dict(banks)
        first = self._resume(banks)
        numbers = range(config.fixed_views if first < config.epochs else 0)
        views = [self._view(number, f"view {number + 1}/{len(numbers)}") for number in numbers]
        log = RunLog(self.output, {"epochs": read_rows(self.output, "epochs", lambda row: row["epoch"] <= first)})
        last_save = time.monotonic()
        try:
            for epoch in range(first, config.epochs):
                label, done = f"epoch {epoch + 1}/{config.epochs}", epoch + 1
                features = views[epoch % len(views)] if views else self._view(epoch, label)
                losses = self._train_epoch(banks, epoch, features)
                log.write("epochs", {"epoch": done, "step": done, **losses})
                last = done == config.epochs
                if stop or last or time.monotonic() - last_save >= 60 * checkpoint_minutes:
                    self._save(banks, done)
                    last_save = time.monotonic()
                    left = self.clock.seconds / done * (config.epochs - done)
                    print(f"{label}, {left / 60:.0f} min to go", flush=True)
                if stop and not last:
                    raise PreemptedError(
                        f"asked to stop: the state is in {self.output}; give the same command again to resume"
                    )
        finally:
            log.close()

    def _bank(self, spec: BackboneSpec) -> HeadBank:
        layers = [new_classifier(spec, self.images.outputs, seed=seed) for seed in self.seeds]
        return HeadBank(layers, self.config.settings, momentum=self.config.momentum, device=self.compute.device)

    def _train_epoch(
        self, banks: Mapping[str, Sequence[HeadBank]], epoch: int, features: Sequence[Tensor]
    ) -> dict[str, float]:
        """One epoch of every bank; the mean losses over the seeds of those trained on all images, in nats."""
        config, rate = self.config, 0.1 ** (epoch // self.config.lr_step)
        losses: dict[str, float] = {}
        for part, images in self.parts.items():
            orders = self._orders(images, epoch).to(self.labels.device)
            for label, bank, x in zip(self.checkpoints, banks[part], features, strict=True):
                loss = bank.train_epoch(x, self.labels, orders, batch_size=config.batch_size, rate=rate)
                if part == "all":
                    names = [f"{label}/{setting}/loss" for setting in config.settings]
                    losses |= dict(zip(names, loss.mean(0).tolist(), strict=True))
        return losses

    def _save(self, banks: Mapping[str, Sequence[HeadBank]], epoch: int) -> None:
        extractors = self.features.extractors.values()
        state = {
            "epoch": epoch,
            "banks": {part: [bank.state_dict() for bank in of_part] for part, of_part in banks.items()},
            "extractors": [one.state_dict() if self.trains_statistics else {} for one in extractors],
        }
        save_tensors(self.state, state)
        self.clock.save()

    def _resume(self, banks: Mapping[str, Sequence[HeadBank]]) -> int:
        """Load the state of an interrupted probe; the number of finished epochs."""
        if not self.state.exists():
            return 0
        state = load_tensors(self.state)
        for part, of_part in banks.items():
            for bank, saved in zip(of_part, state["banks"][part], strict=True):
                bank.load_state_dict(saved)
        for extractor, saved in zip(self.features.extractors.values(), state["extractors"], strict=True):
            if saved:
                extractor.load_state_dict(saved)
        self.clock.resume(state.get("seconds"))
        print(f"resuming from {self.state}: epoch {state['epoch'] + 1}", flush=True)
        return int(state["epoch"])

    def regress(self) -> None:
        """Solve for the optimum of every penalty, for every backbone."""
        features = self._features(self._plain(self.images.train), "features")
        penalties = [Penalty(value) for value in self.config.penalties]
        for part, images in self.parts.items():
            rows = images.to(self.labels.device)
            self.heads[part] = [
                logistic_regressions(x[rows], self.labels[rows], outputs=self.images.outputs, penalties=penalties)
                for x in features
            ]

    def finish(self) -> list[RunRecord]:
        """Evaluate the trained heads, choose a setting for each backbone, and write its trials."""
        # Selection comes first, and test images are read after it: they cannot have a part in it.
        selections: list[Selection | None] = [None] * len(self.checkpoints)
        if len(self.config.grid) == 1:
            selections = [Selection(str(self.config.grid[0]), "nothing", {})] * len(selections)
        elif "selecting" in self.heads:
            features = self._features(self._plain(self.held_out), "held out")
            for place, pair in enumerate(zip(self.heads["selecting"], features, strict=True)):
                scores = self._scores(*pair, self.held_out)
                selections[place] = Selection(select(scores), "held_out", scores)
        test = self._features(self._plain(self.images.test), "test")
        records = []
        for label, heads, x, selection in zip(self.checkpoints, self.heads["all"], test, selections, strict=True):
            found = self._scores(heads, x, self.images.test)
            chosen = selection or Selection(select(found), "test", found)
            setting = next(setting for setting in heads.settings if str(setting) == chosen.selected)
            for place, seed in enumerate(self.seeds):
                value = found[chosen.selected][place]
                if value is None:
                    raise TrainingFailedError(f"{chosen.selected} diverged for {label}: give lower --lrs")
                records.append(self._write(label, seed, heads.classifier(place, setting), value, chosen))
        self.state.unlink(missing_ok=True)
        return records

    def _scores(self, heads: Heads, features: Tensor, dataset: ClassificationDataset) -> dict[str, list[float | None]]:
        """For each setting, the accuracy (0-100) of every trial's head; None where it diverged."""
        labels = torch.tensor(dataset.labels)
        right, finite = (heads.predict(features).cpu() == labels).double(), heads.finite.tolist()

        def score(trial: int, place: int) -> float | None:
            if not finite[trial][place]:
                return None
            return accuracy(labels.bincount(right[trial, place]), labels.bincount(), self.images.metric)

        trials = range(len(right))
        return {str(setting): [score(trial, place) for trial in trials] for place, setting in enumerate(heads.settings)}

    def _write(self, label: str, seed: int, classifier: nn.Linear, value: float, selection: Selection) -> RunRecord:
        """A trial's network and record."""
        config, checkpoint, folder = self.config, self.checkpoints[label], self._folder(label, seed)
        spec = transferred_spec(checkpoint, self.images.outputs, normalize=config.normalize)
        extractor = self.features.extractors[label].backbone
        weights = {**extractor.state_dict(), **classifier_weights(spec, classifier)}
        threat_model, classes = checkpoint.threat_model, self.images.test.classes
        path = folder / "checkpoint.pt"
        write_checkpoint(path, spec=spec, state_dict=weights, threat_model=threat_model, classes=classes)
        metrics: dict[str, float | None] = {"clean_accuracy": value}
        if config.eval_threat_model is not None:
            images = self._plain(self.images.test)
            if config.eval_images:
                images = images.sample(config.eval_images, seed=config.data_seed)
            # The adversary sees backbone and head.
            metrics["robust_accuracy"] = evaluate(
                NormalizedModel(backbone_with(spec, weights), spec).to(self.compute.device),
                val_batches(images, EVALUATION_BATCH, workers=self.workers),
                config.eval_threat_model,
                config.eval_attack,
                self.compute,
                generator=torch.Generator(self.compute.device).manual_seed(seed),
                metric=self.images.metric,
                description=f"attack on seed {seed}",
            )["robust_accuracy"]
        more = {"metrics": metrics, "seed": seed, "seconds": self.clock.seconds}
        record = trial_record(folder, MODE, checkpoint, self.images, selection, config.to_dict(), **more)
        record.write(folder / "record.json")
        return record
