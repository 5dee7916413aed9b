"""The protocol of ImageNet-RIB: fine-tune on each set in turn, measure on all; a record a cell, shared by processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification.compute import Compute
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import DivergedError, InputError, PreemptedError
from robust_backbones.models import NormalizedModel
from robust_backbones.runs.distributed import StopRequest, stop_on_signals
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.identity import claim
from robust_backbones.runs.locks import HeldError, lock
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.distances import distances, load_library
from robust_backbones.transfer.inheritance.fisher import diagonal_fisher
from robust_backbones.transfer.inheritance.matrix import DISTANCES, Cell
from robust_backbones.transfer.inheritance.methods import (
    PRETRAINED,
    Job,
    accuracy_on,
    check_size,
    find,
    for_evaluation,
    ordered,
)
from robust_backbones.transfer.inheritance.related_sets import (
    PRETRAINING,
    Memory,
    RelatedSet,
    open_pretraining_set,
    open_related_set,
)
from robust_backbones.transfer.inheritance.weights import Weights

TASK = "inheritance"
_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class ProtocolExecution:
    """Where and how the protocol is computed; results do not depend on it."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 2
    """Processes that decode images, each of which is decoded once."""
    memory_gb: float = 8.0
    """Room for decoded images; sets that find none are decoded at every use."""


def run_protocol(
    config: InheritanceConfig,
    checkpoints: Mapping[str, Checkpoint],
    pretraining: Path,
    sets: Mapping[str, Path],
    output: Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    execution: ProtocolExecution = ProtocolExecution(),
) -> list[RunRecord]:
    """Evaluate every backbone on all sets, and again after fine-tuning on each of them in turn.

    ``output/LABEL`` gets ``pretrained/record.json``, ``distances/record.json`` and, for each method, set and seed,
    ``METHOD/SET/seed_S/record.json`` with the fine-tuned network as ``checkpoint.pt``. Records are of task
    ``inheritance``; their metrics are ``accuracy/SET`` (0-100) for every set and for PRETRAINING, the validation set of
    pre-training. Cells that are there are not run again, and any number of processes may share an output.

    Args:
        checkpoints: backbones by label, each with the classifier of pre-training.
        pretraining: folder of the pre-training set, with train/ and val/.
        sets: folders of the related sets by name.
        methods: what a method needs (``Method.needs``) is run too.

    Raises:
        InputError: data that cannot be used; ``output`` holds another run.
        DivergedError: the loss of a training is not finite.
        PreemptedError: SIGTERM or SIGUSR1 came; finished cells are kept.
    """
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
    transform = val_transform(config.image_size, resize=config.val_resize)
    train_images, validation = open_pretraining_set(pretraining, num_classes, transform)
    related = {
        name: open_related_set(path, validation.images.classes, transform, name=name) for name, path in sets.items()
    }
    everything = {
        name: one.limited(config.limit, seed=config.data_seed)
        for name, one in {**related, PRETRAINING: validation}.items()
    }
    for name in related:
        check_size(everything[name], config)
    with stop_on_signals() as stop:
        run = _Run(config, checkpoints, train_images, everything, output, execution, stop)
        for label, checkpoint in checkpoints.items():
            run.claim(label, checkpoint, pretraining.name)
        cells = []
        for label in checkpoints:
            cells += [Cell(label, PRETRAINED)] + [Cell(label, DISTANCES)] * bool(config.distance_images)
            cells += [Cell(label, name, target, seed) for seed in seeds for name in names for target in related]
        return run.run(cells)


class _Run:
    def __init__(
        self,
        config: InheritanceConfig,
        checkpoints: Mapping[str, Checkpoint],
        train_images: ClassificationDataset,
        sets: Mapping[str, RelatedSet],
        output: Path,
        execution: ProtocolExecution,
        stop: StopRequest,
    ) -> None:
        self.config, self.sets, self.output, self.stop = config, dict(sets), output, stop
        self.checkpoints = {label: checkpoint.in_rgb() for label, checkpoint in checkpoints.items()}
        self.train_images = train_images
        self.compute = Compute(torch.device(execution.device), config.precision)
        self.memory = Memory(execution.memory_gb, execution.workers)

    def claim(self, label: str, checkpoint: Checkpoint, pretraining: str) -> None:
        """Make the folder of a backbone that of this run; methods and seeds may be added to one later."""
        identity = {
            **self.config.to_dict(),
            "checkpoint_sha256": checkpoint.source_sha256,
            "pretraining": pretraining,
            "sets": {name: [len(related.images), len(related.classes)] for name, related in self.sets.items()},
        }
        claim(self.output / label, identity, type(self.config)().to_dict())

    def run(self, cells: Sequence[Cell]) -> list[RunRecord]:
        """Run what is not there yet, but for what others are at work on; wait for them in the end."""
        pending = [cell for cell in cells if not self._record(cell).exists()]
        if 0 < len(pending) < len(cells):
            print(f"{len(cells) - len(pending)} of {len(cells)} cells are there", flush=True)
        seconds: list[float] = []
        while pending:
            waiting = []
            for cell in pending:
                if self.stop:
                    raise PreemptedError("asked to stop: finished cells are kept, and the same command goes on")
                if not self._try(cell, seconds):
                    waiting.append(cell)
                    continue
                left = sum(not self._record(other).exists() for other in cells)
                pace = f", about {fmean(seconds) * left / 60:.0f} min to go" if seconds and left else ""
                print(f"{self._told(cell)}; {len(cells) - left} of {len(cells)} cells{pace}", flush=True)
            if len(waiting) == len(pending):
                time.sleep(_WAIT_SECONDS)
            pending = waiting
        return [RunRecord.read(self._record(cell)) for cell in cells]

    def _record(self, cell: Cell) -> Path:
        return self.output / cell.folder / "record.json"

    def _try(self, cell: Cell, seconds: list[float]) -> bool:
        """Whether the cell is done; False where what it needs is not there yet, or another process has it in hand."""
        needs = find(cell.method, self.config).needs if cell.target else ()
        if not all(self._record(replace(cell, method=name)).exists() for name in needs):
            return False
        try:
            with lock(self.output / cell.folder / "lock.json"):
                if not self._record(cell).exists():
                    start = time.perf_counter()
                    self._run(cell, start)
                    if cell.target:
                        seconds.append(time.perf_counter() - start)
        except HeldError:
            return False
        return True

    def _run(self, cell: Cell, start: float) -> None:
        checkpoint, folder = self.checkpoints[cell.label], self.output / cell.folder
        for name, related in self.sets.items():
            self.sets[name] = replace(related, images=self.memory.keep(related.images, name))
        extra = {}
        if cell.method == DISTANCES:
            metrics, count = distances(self.config, checkpoint, self.train_images, self.sets, self.compute, self.memory)
            extra["images"] = count
        else:
            metrics = self._accuracies(self._model(cell, checkpoint))
        record = RunRecord(
            run_id=str(cell.folder),
            task=TASK,
            backbone={**checkpoint.spec.to_dict(), "source_sha256": checkpoint.source_sha256, "label": cell.label},
            threat_model=None if checkpoint.threat_model is None else str(checkpoint.threat_model),
            dataset=cell.target or PRETRAINING,
            metrics=dict(metrics),
            seed=cell.seed,
            config={**self.config.to_dict(), "method": cell.method, "target": cell.target, **extra},
            seconds=time.perf_counter() - start,
        )
        record.write(folder / "record.json")

    def _model(self, cell: Cell, checkpoint: Checkpoint) -> NormalizedModel:
        """The network to evaluate; one that was fine-tuned is written too."""
        if cell.method == PRETRAINED:
            return NormalizedModel(checkpoint.build(), checkpoint.spec).to(self.compute.device)
        method = find(cell.method, self.config)
        job = Job(
            config=self.config,
            start=checkpoint,
            target=self.sets[cell.target],
            seed=cell.seed,
            compute=self.compute,
            memory=self.memory,
            fisher=partial(self._fisher, cell.label),
            weights=lambda name: self._weights(replace(cell, method=name)),
            stop=lambda: self.stop,
        )
        device = self.compute.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(cell.seed)  # dropout draws from the global generators
            try:
                model = method.run(job)
            except DivergedError as error:
                raise DivergedError(
                    f"{cell}: {error}; finished cells are kept, and another --lr needs another --output"
                ) from None
        if method.whole_network:
            write_checkpoint(
                self.output / cell.folder / "checkpoint.pt",
                spec=checkpoint.spec,
                state_dict=model.backbone.state_dict(),
                threat_model=checkpoint.threat_model,
            )
        return model

    def _accuracies(self, model: NormalizedModel) -> dict[str, float]:
        network = for_evaluation(model, self.compute)
        return {
            f"accuracy/{name}": accuracy_on(related, network, self.compute, self.memory)
            for name, related in self.sets.items()
        }

    def _weights(self, cell: Cell) -> Weights:
        weights: Weights = load_tensors(self.output / cell.folder / "checkpoint.pt")["state_dict"]
        return weights

    def _fisher(self, label: str) -> Weights:
        """Computed once a backbone and kept beside its cells."""
        path = self.output / label / "fisher.pt"
        if not path.exists():
            config, checkpoint = self.config, self.checkpoints[label]
            images = self.train_images.sample(config.fisher_images, seed=config.data_seed)
            print(f"{label}: Fisher information on {len(images)} images", flush=True)
            fisher = diagonal_fisher(
                NormalizedModel(checkpoint.build(), checkpoint.spec).to(self.compute.device),
                val_batches(images, 16, workers=self.memory.workers),
                replace(self.compute, precision="fp32"),
                labels=config.fisher_labels,
                generator=torch.Generator().manual_seed(config.data_seed),
            )
            with atomic_path(path) as temporary:
                torch.save({name: tensor.cpu() for name, tensor in fisher.items()}, temporary)
        return load_tensors(path)

    def _told(self, cell: Cell) -> str:
        """The cell's result in one line."""
        metrics = RunRecord.read(self._record(cell)).metrics
        if not cell.target:
            return f"{cell}: " + ", ".join(
                f"{name} {value:.1f}" for name, value in metrics.items() if value is not None
            ).replace("accuracy/", "")
        return (
            f"{cell}: {metrics[f'accuracy/{cell.target}']:.1f} % there, "
            f"{metrics[f'accuracy/{PRETRAINING}']:.1f} % on pre-training"
        )
