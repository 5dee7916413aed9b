"""The protocol of ImageNet-RIB: fine-tune on each set, evaluate on all; one record per cell, shared by processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from robust_backbones.checkpoint.format import Checkpoint, save_tensors, write_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.compute import Compute, available
from robust_backbones.classification.robustness import check_classes
from robust_backbones.data.batches import check_fills_batch, val_batches
from robust_backbones.data.datasets import ClassificationDataset, warn_of_shared
from robust_backbones.errors import DivergedError, InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, fed_as
from robust_backbones.runs.cells import is_finished, run_cells
from robust_backbones.runs.folders import shared
from robust_backbones.runs.identity import FINGERPRINT
from robust_backbones.runs.record import RunRecord
from robust_backbones.runs.signals import StopRequest, stop_on_signals
from robust_backbones.transfer.inheritance.config import PRETRAINED, PRETRAINING, InheritanceConfig
from robust_backbones.transfer.inheritance.distances import distances, load_library
from robust_backbones.transfer.inheritance.job import Job, Weights, accuracy_on, for_evaluation
from robust_backbones.transfer.inheritance.matrix import DISTANCES, MatrixCell
from robust_backbones.transfer.inheritance.methods import diagonal_fisher, find, ordered
from robust_backbones.transfer.inheritance.sets import Memory, RelatedSet, open_pretraining_set, open_related_set
from robust_backbones.transfer.protocol import Backbones, read_backbones

TASK = "inheritance"
DEFAULT_METHODS = ("fine_tuning", "linear_probe", "lp_ft", "lwf", "l2_init", "wise_ft", "uniform_soup")


def run_protocol(
    backbones: Backbones,
    pretraining: str | Path,
    sets: Mapping[str, str | Path],
    output: str | Path,
    config: InheritanceConfig = InheritanceConfig(),
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    workers: int = 2,
    memory_gb: float = 8.0,
) -> list[RunRecord]:
    """Evaluate every backbone on all sets, and again after fine-tuning on each of them in turn.

    ``output/LABEL`` gets ``pretrained/record.json``, ``distances/record.json`` and, for each method, set and seed,
    ``METHOD/SET/seed_S/record.json`` with the fine-tuned network as ``checkpoint.pt``. Their metrics are
    ``accuracy/SET`` (0-100) for every set and for PRETRAINING, the validation set of pre-training. Finished cells are
    kept, and any number of processes may share an output. The defaults are ImageNet-RIB's (Hwang et al. 2024).

    Args:
        backbones: checkpoints or their files, by label or in a list, each with the classifier of pre-training.
        pretraining: folder of the pre-training set, with train/ and val/.
        sets: folders of the related sets by name.
        methods: the methods they need are run too.
        memory_gb: memory for decoded images; sets that do not fit are decoded at every use.

    Raises:
        InputError: data that cannot be used; ``output`` holds another run.
        DivergedError: the loss of a training is not finite.
        PreemptedError: SIGTERM or SIGUSR1 was received; finished cells are kept.
    """
    checkpoints = {label: checkpoint.in_rgb() for label, checkpoint in read_backbones(backbones).items()}
    names = ordered(list(methods), config)
    if len(sets) < 2:
        raise InputError("robustness is inherited between sets: give two or more related sets")
    if PRETRAINING in sets:
        raise InputError(f"a related set cannot be called {PRETRAINING}: rename its folder")
    if config.distance_images:
        load_library()  # it says so when it is missing, before anything is written
    (num_classes, *others) = {checkpoint.spec.num_classes for checkpoint in checkpoints.values()}
    if others or not num_classes:
        raise InputError("the backbones must have the classifier of the pre-training set, all with the same classes")
    compute = Compute(available(device), config.precision)
    config = fed_as(config, *(checkpoint.spec for checkpoint in checkpoints.values()))
    print("".join(f"{warning}\n" for warning in config.crop_warnings()), end="", flush=True)
    transform = config.val_transform()
    train_images, validation = open_pretraining_set(Path(pretraining), num_classes, transform)
    classes = validation.images.classes
    for checkpoint in checkpoints.values():
        check_classes(classes, Path(pretraining) / "val", checkpoint)
    opened = [open_related_set(Path(path), classes, transform, name=name) for name, path in sets.items()]
    found = {one.name: one.limited(config.limit, seed=config.data_seed) for one in (*opened, validation)}
    warn_of_shared(train_images, *(related.images for related in found.values()))
    for name in sets:
        check_fills_batch(name, len(found[name].images), config.batch_size)
    about = {
        "pretraining": Path(pretraining).name,
        "sets": {name: [len(related.images), len(related.classes)] for name, related in found.items()},
        FINGERPRINT: {f"{PRETRAINING}/train": train_images.fingerprint()}
        | {name: related.images.fingerprint() for name, related in found.items()},
    }
    memory = Memory(memory_gb, workers)
    with stop_on_signals() as stop, ExitStack() as stack:
        for label, checkpoint in checkpoints.items():  # methods and seeds may be added to an output later
            identity = {**config.to_dict(), "checkpoint_sha256": checkpoint.source_sha256, **about}
            defaults = fed_as(type(config)(), BackboneSpec()).to_dict()
            stack.enter_context(shared(Path(output) / label, identity, defaults))
        run = _Run(config, checkpoints, train_images, found, Path(output), compute, memory, stop)
        cells = [MatrixCell(label, PRETRAINED) for label in checkpoints]
        cells += [MatrixCell(label, DISTANCES) for label in checkpoints if config.distance_images]
        every = product(checkpoints, seeds, names, sets)
        cells += [MatrixCell(label, name, target, seed) for label, seed, name, target in every]
        run_cells(cells, run.folder, run.run, stop, ready=run.is_ready)
        return [RunRecord.read(run.folder(cell) / "record.json") for cell in cells]


@dataclass
class _Run:
    config: InheritanceConfig
    checkpoints: Mapping[str, Checkpoint]
    train_images: ClassificationDataset
    sets: dict[str, RelatedSet]
    output: Path
    compute: Compute
    memory: Memory
    stop: StopRequest

    def folder(self, cell: MatrixCell) -> Path:
        return self.output / cell.folder

    def is_ready(self, cell: MatrixCell) -> bool:
        """Whether the cells that it needs are finished."""
        needs = find(cell.method, self.config).needs if cell.target else ()
        return all(is_finished(self.folder(replace(cell, method=name))) for name in needs)

    def run(self, cell: MatrixCell) -> str:
        """Write the record of a cell; returns its result in one line."""
        start, checkpoint, extra = time.perf_counter(), self.checkpoints[cell.label], {}
        for name, related in self.sets.items():
            self.sets[name] = replace(related, images=self.memory.keep(related.images, name))
        if cell.method == DISTANCES:
            inputs = (self.config, checkpoint, self.train_images, self.sets, self.compute)
            metrics, extra["images"] = distances(*inputs, workers=self.memory.workers)
        else:
            network = for_evaluation(self._model(cell, checkpoint), self.compute)
            metrics = {
                f"accuracy/{name}": accuracy_on(related, network, self.compute, workers=self.memory.workers)
                for name, related in self.sets.items()
            }
        fields = {
            **checkpoint.record_fields(label=cell.label),
            "dataset": cell.target or PRETRAINING,
            "seed": cell.seed,
        }
        config = {**self.config.to_dict(), "method": cell.method, "target": cell.target, **extra}
        seconds = time.perf_counter() - start
        record = RunRecord(str(cell.folder), TASK, metrics=dict(metrics), config=config, seconds=seconds, **fields)
        record.write(self.folder(cell) / "record.json")
        return f"{cell}: " + ", ".join(f"{name.split('/')[-1]} {value:.1f}" for name, value in metrics.items())

    def _model(self, cell: MatrixCell, checkpoint: Checkpoint) -> NormalizedModel:
        """The network to evaluate; a fine-tuned one is saved too."""
        device = self.compute.device
        if cell.method == PRETRAINED:
            return checkpoint.model().to(device)
        method = find(cell.method, self.config)
        job = Job(
            config=self.config,
            start=checkpoint,
            target=self.sets[cell.target],
            seed=cell.seed,
            compute=self.compute,
            workers=self.memory.workers,
            fisher=partial(self._fisher, cell.label),
            weights=lambda name: load_tensors(self.folder(replace(cell, method=name)) / "checkpoint.pt")["state_dict"],
            stop=self.stop,
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(cell.seed)  # dropout draws from the global generators
            try:
                model = method.run(job)
            except DivergedError as error:
                raise DivergedError(
                    f"{cell}: {error}; finished cells are kept, and another --lr needs another --output"
                ) from None
        if method.whole_network:
            path, weights = self.folder(cell) / "checkpoint.pt", model.backbone.state_dict()
            spec, threat_model, classes = checkpoint.spec, checkpoint.threat_model, checkpoint.classes
            write_checkpoint(path, spec=spec, state_dict=weights, threat_model=threat_model, classes=classes)
        return model

    def _fisher(self, label: str) -> Weights:
        """Computed once per backbone and kept beside its cells."""
        path = self.output / label / "fisher.pt"
        if not path.exists():
            images = self.train_images.sample(self.config.fisher_images, seed=self.config.data_seed)
            print(f"{label}: Fisher information on {len(images)} images", flush=True)
            fisher = diagonal_fisher(
                self.checkpoints[label].model().to(self.compute.device),
                val_batches(images, 16, workers=self.memory.workers),
                replace(self.compute, precision="fp32"),
                labels=self.config.fisher_labels,
                generator=torch.Generator().manual_seed(self.config.data_seed),
            )
            save_tensors(path, {name: tensor.cpu() for name, tensor in fisher.items()})
        return load_tensors(path)
