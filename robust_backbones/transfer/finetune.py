"""Full-network transfer: the whole network, or its last stages, is trained by the engine of pre-training."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import available
from robust_backbones.classification.config import Execution, TrainingConfig
from robust_backbones.classification.train import TrainingTask, train
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.data.transfer_datasets import TransferData
from robust_backbones.errors import DivergedError, InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, fed_as
from robust_backbones.runs.distributed import Processes, join_processes, local_device
from robust_backbones.runs.folders import claimed
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.config import Setting, TransferConfig
from robust_backbones.transfer.networks import (
    DEPTH,
    layer_wise_rates,
    new_classifier,
    transferred_spec,
    with_classifier,
)
from robust_backbones.transfer.protocol import (
    Backbones,
    Selection,
    TransferImages,
    open_data,
    read_backbones,
    select,
    settings_of,
    trial_record,
    without_unreadable,
)

MODE = "full_network"


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """How the network is fine-tuned. The defaults are the paper's full-network recipe.

    A grid (``TransferConfig``) sets ``lr``, ``weight_decay`` and ``seed``. With epsilon > 0 in ``threat_model`` this is
    adversarial fine-tuning.
    """

    epochs: int = 150
    batch_size: int = 64
    """Global: images that one optimiser step sees, over all processes and micro-batches."""
    lr: float = 0.01
    lr_step: int = 50
    weight_decay: float = 5e-4
    eval_period: int = 150
    """Epochs between evaluations; the last epoch is always evaluated."""
    freeze: int = 0
    """Number of groups to freeze, batch norms too: 1 the stem, 2 to 5 also the stages after it (as FREEZE_AT)."""
    layer_decay: float = 1.0
    """Each group's learning rate as a share of the next one's towards the output; the classifier's is ``lr``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.freeze <= DEPTH:
            raise InputError(f"freeze is a number of groups from the input on, 0 to {DEPTH}, got {self.freeze}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay is a share of the next group's rate, in (0, 1], got {self.layer_decay:g}")


def full_finetune(
    backbones: Backbones,
    data: TransferData | str | Path,
    output: str | Path,
    grid: TransferConfig = TransferConfig(),
    config: FinetuneConfig = FinetuneConfig(),
    execution: Execution = Execution(),
) -> list[RunRecord]:
    """Choose a setting for every backbone and fine-tune it once per seed; the defaults are the recipe of the paper.

    ``output/LABEL/seed_S/record.json`` (task ``transfer``) has the metrics ``clean_accuracy`` and ``robust_accuracy``,
    0-100, by the data set's metric. Every run of the grid has a folder in ``output/LABEL/runs/``, with the files of
    ``train.train``: finished runs are kept, an interrupted one resumes. Selection on held-out images uses one run per
    setting, with the first seed; selection on test images uses every seed. Under torchrun each process calls this.

    Args:
        backbones: checkpoints or their files, by label (the folder's name) or in a list.
        data: an opened data set, or a folder with train/ and test/.

    Raises:
        InputError: data or config that cannot be used; ``output`` holds another experiment.
        TrainingFailedError: every setting diverged, or the chosen one with another seed.
        PreemptedError: SIGTERM or SIGUSR1 was received; the state is saved.
    """
    checkpoints, opened, output = read_backbones(backbones), open_data(data), Path(output)
    config = fed_as(config, *(checkpoint.spec for checkpoint in checkpoints.values()))
    available(execution.device)
    usable = partial(TransferImages, grid, settings=len(grid.settings), batch_size=config.batch_size)
    images = usable(opened)  # refuses what it cannot use, before anything is written
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(local_device(execution.device)))
        plain = {**config.to_dict(), **grid.to_dict(), "mode": MODE}
        defaults = {**fed_as(type(config)(), BackboneSpec()).to_dict(), **type(grid)().to_dict()}
        own = settings_of(plain, checkpoints, opened)
        stack.enter_context(claimed(output, own, defaults, processes=processes))
        if execution.skip_unreadable:
            images = usable(without_unreadable(opened, output, workers=execution.workers, processes=processes))
            execution = replace(execution, skip_unreadable=False)
        records = []
        for label, checkpoint in checkpoints.items():
            backbone = _Backbone(grid, config, checkpoint, images, output / label, execution, processes)
            records += backbone.trials()
        return records


@dataclass
class _Backbone:
    """The runs of one backbone."""

    grid: TransferConfig
    config: FinetuneConfig
    checkpoint: Checkpoint
    images: TransferImages
    folder: Path
    execution: Execution
    processes: Processes

    def trials(self) -> list[RunRecord]:
        """Choose a setting, run it with every seed, and write the records."""
        selection, records = self._select(), []
        if self.processes.is_main:
            print(f"{self.folder.name}: {selection.selected}, selected on {selection.on}", flush=True)
        setting = next(setting for setting in self.grid.settings if str(setting) == selection.selected)
        for seed in self.grid.seeds:
            run = self._run(setting, seed, selecting=False)
            folder, config = self.folder / f"seed_{seed}", {**run.config, **self.grid.to_dict(), "run": run.run_id}
            kept = {name: getattr(run, name) for name in ("metrics", "seconds", "git_commit", "versions")}
            record = trial_record(folder, MODE, self.checkpoint, self.images, selection, config, seed=seed, **kept)
            if self.processes.is_main:
                record.write(folder / "record.json")
            records.append(record)
        return records

    def _select(self) -> Selection:
        settings, on = self.grid.settings, self.grid.select_on
        if len(settings) == 1:
            return Selection(str(settings[0]), "nothing", {})
        scores: dict[str, list[float | None]] = {str(setting): [] for setting in settings}
        for setting, seed in product(settings, self.grid.seeds if on == "test" else self.grid.seeds[:1]):
            try:
                score = self._run(setting, seed, selecting=on == "held_out").metrics["clean_accuracy"]
            except DivergedError as error:
                score = None
                if self.processes.is_main:
                    print(f"{setting} is out: {str(error).split(';')[0]}", flush=True)  # the rest is for a single run
            scores[str(setting)].append(score)
        return Selection(select(scores), on, scores)

    def _run(self, setting: Setting, seed: int, *, selecting: bool) -> RunRecord:
        """One training: on all images, then tested; or without the held-out images, then evaluated on them."""
        grid, images, checkpoint = self.grid, self.images, self.checkpoint
        config = replace(self.config, lr=setting.lr, weight_decay=setting.weight_decay, seed=seed)
        training, evaluated = images.train, images.test
        if selecting:
            training, evaluated = images.train.take(images.kept), images.train.take(images.held_out)
        spec = transferred_spec(checkpoint, images.outputs, normalize=grid.normalize)

        def build() -> NormalizedModel:
            classifier = new_classifier(checkpoint.spec, images.outputs, seed=seed)
            return with_classifier(checkpoint, classifier, normalize=grid.normalize, freeze=config.freeze)

        def prepared(part: ClassificationDataset) -> ClassificationDataset:
            view = part.seen_through(config.val_transform(), seed=seed)
            view.cache = config.image_cache(self.execution.cache)
            return view

        task = TrainingTask(
            name="finetune",
            dataset=images.name,
            train=prepared(training),
            val=prepared(evaluated),
            spec=spec,
            build=build,
            parameter_groups=partial(layer_wise_rates, spec=spec, lr=config.learning_rate, decay=config.layer_decay),
            identity={"checkpoint": checkpoint.source_sha256, "data": images.name, "images": len(training)},
            **checkpoint.record_fields(),
            metric=images.metric,
            keep_best=False,
        )
        part = "held_out" if selecting else "test"
        return train(config, task, self.folder / "runs" / f"{setting}_{part}_seed{seed}", self.execution)
