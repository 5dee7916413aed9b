"""A linear probe's grid: one pass for all heads against a run for each, as the public code does it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.turns import Arrays, Side, Way
from benchmarks.work import Check, Reach, Work
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import augmentation, val_transform
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.config import ProbeConfig, Setting
from robust_backbones.transfer.linear_probe import linear_probe
from robust_backbones.transfer.networks import DEPTH, new_classifier, with_classifier
from robust_backbones.transfer.protocol import order_of

ALONE = "a run for each head, fp32"
ONE_PASS = {precision: f"ours: one pass for all heads, {precision}" for precision in ("fp32", "bf16")}
CHECKED_EPOCHS = 2


@dataclass(frozen=True, kw_only=True)
class Probe(Work):
    """A linear probe of 2 learning rates x 3 seeds."""

    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "Linear probe: 2 learning rates x 3 seeds"
    on_gpu: ClassVar[bool] = True

    data: Path
    """Folder that holds train/ and test/."""
    arch: str = "resnet50"
    image_size: int = 224
    images: int = 16
    """Training images, and as many test images."""
    epochs: int = 10
    """Of the recipe's 150: with fewer, what is done once weighs more."""
    rounds: int = 1
    warm_up: ClassVar[int] = 0
    """The check has done it."""

    @property
    def record(self) -> Path:
        """One for each size and length."""
        record = super().record
        return record.with_stem(record.stem.replace("probe", f"probe-{self.image_size}px-{self.epochs}epochs"))

    def ways(self) -> list[Way]:
        options = {
            "data": str(self.data),
            "arch": self.arch,
            "image_size": self.image_size,
            "images": self.images,
            "epochs": self.epochs,
        }
        return [
            Way(ALONE, "probe:alone", options),
            *(Way(name, "probe:ours", {**options, "precision": kind}) for kind, name in ONE_PASS.items()),
        ]

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        ours = results[ONE_PASS["fp32"]]
        alone = results[ALONE]["heads"].reshape(-1, *ours["heads"].shape)[int(ours["selected"])]
        gap = float(np.abs(alone - ours["heads"]).max())
        return [Check(f"weights of the selected heads after {CHECKED_EPOCHS} epochs, fp32, largest gap", gap, 1e-5)]

    def reaches(self) -> list[Reach]:
        return [Reach(ONE_PASS["fp32"], ALONE, at_least=10), Reach(ONE_PASS["bf16"], ALONE, at_least=24)]

    @property
    def remark(self) -> str:
        return (
            f"{self.arch} at {self.image_size} px, {self.epochs} epochs of {self.images} training images, the same "
            "augmentation of every image on both sides. The other side is a frozen network with a new classifier in "
            "plain PyTorch, trained six times."
        )


@dataclass(frozen=True)
class _Task:
    config: ProbeConfig
    checkpoint: Checkpoint
    data: TransferData

    @classmethod
    def of(cls, data: str, arch: str, image_size: int, images: int, epochs: int) -> _Task:
        resize = round(image_size * 256 / 224)
        opened, transform = open_transfer_data(data, None), val_transform(image_size, resize=resize)
        part = {
            name: getattr(opened, name).sample(images, seed=0).seen_through(transform) for name in ("train", "test")
        }
        config = ProbeConfig(
            select_on="test", epochs=epochs, batch_size=images, image_size=image_size, val_resize=resize
        )
        spec = BackboneSpec(arch, 10)  # time does not depend on the weights
        checkpoint = Checkpoint(spec, build_backbone(spec).state_dict(), None, "robust_backbones", "random", "")
        return cls(config, checkpoint, replace(opened, **part))


def ours(*, precision: str, device: str, **options: Any) -> Side:
    task = _Task.of(**options)

    def run(config: ProbeConfig, folder: Path) -> None:
        checkpoints = {"net": task.checkpoint}
        linear_probe(checkpoints, task.data, folder, replace(config, precision=precision), device=device, workers=0)

    def result() -> Arrays:
        with tempfile.TemporaryDirectory() as folder:
            run(replace(task.config, epochs=CHECKED_EPOCHS), Path(folder))
            trials = sorted(Path(folder).glob("net/*/checkpoint.pt"))
            heads = [read_checkpoint(path).state_dict["fc.weight"].numpy() for path in trials]
            selected = RunRecord.read(trials[0].with_name("record.json")).config["selection"]["selected"]
        return {"heads": np.stack(heads), "selected": np.array([str(s) for s in task.config.settings].index(selected))}

    return Side(_in_a_folder(lambda folder: run(task.config, folder)), result)


def alone(*, device: str, **options: Any) -> Side:
    task = _Task.of(**options)

    def run(config: ProbeConfig) -> Arrays:
        grid = [(setting, seed) for setting in config.settings for seed in config.seeds]
        return {"heads": np.stack([_probe_alone(task, config, *place, device=device) for place in grid])}

    return Side(lambda: run(task.config), lambda: run(replace(task.config, epochs=CHECKED_EPOCHS)))


def _in_a_folder(run: Callable[[Path], None]) -> Callable[[], None]:
    def inside() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))

    return inside


def _probe_alone(task: _Task, config: ProbeConfig, setting: Setting, seed: int, *, device: str) -> np.ndarray:
    """One run as one writes it first: a frozen network with a new classifier, for one setting and seed."""
    train, test = task.data.train, task.data.test
    classifier = new_classifier(task.checkpoint.spec, len(train.classes), seed=seed)
    model = with_classifier(task.checkpoint, classifier, freeze=DEPTH).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=config.momentum, weight_decay=setting.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step)
    transform = augmentation(config.augmentation, config.image_size, min_crop_scale=config.min_crop_scale)
    model.train()
    for epoch in range(config.epochs):
        images = train.seen_through(transform, epoch=epoch, seed=config.data_seed)
        for batch in order_of(seed, epoch, len(images)).split(config.batch_size):
            pixels, labels = zip(*(images[position] for position in batch.tolist()), strict=True)
            logits = model(torch.stack(pixels).to(device) / 255)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        model(torch.stack([test[position][0] for position in range(len(test))]).to(device) / 255)
    return model.state_dict()["backbone.fc.weight"].cpu().numpy()
