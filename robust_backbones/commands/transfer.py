r"""Transfer backbones to other classification data sets: linear probes, full fine-tuning, and tables of both.

Examples:
    robust-backbones transfer datasets --data-root data
    robust-backbones transfer probe flowers runs/standard/checkpoint.pt runs/robust/checkpoint.pt hub:resnet50_l2_eps3 \
        --data-root data --output runs/flowers_probe
    robust-backbones transfer finetune flowers runs/standard/checkpoint.pt runs/robust/checkpoint.pt --data-root data \
        --output runs/flowers_finetune
    robust-backbones transfer table runs/flowers_probe runs/flowers_finetune --output flowers.md

A data set is one of the twelve of Salman et al. 2020 (`datasets` shows them) or the path of a folder that holds train/
and test/. A backbone is a checkpoint of any source that `robust-backbones convert` knows, or hub:NAME. Both modes
choose learning rate and weight decay on held-out training images; --select-on test selects like the public code, and
tables say so. The same command resumes an interrupted run. `robust-backbones transfer probe --help` lists the
options of one.
Exit status: 0 done, 1 training failed, 2 bad input, 75 preempted (give the command again). --debug shows tracebacks.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from robust_backbones import cpu
from robust_backbones.analysis.record_tables import classification_table
from robust_backbones.analysis.records import RecordedRun
from robust_backbones.classification.config import Execution
from robust_backbones.commands import cli
from robust_backbones.commands.options import DeviceOptions
from robust_backbones.data.transfer_datasets import TRANSFER_DATASETS, check, open_transfer_data
from robust_backbones.errors import InputError, check_not_negative, plural
from robust_backbones.runs.distributed import is_first_process
from robust_backbones.runs.files import write_text
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.config import ProbeConfig, TransferConfig
from robust_backbones.transfer.finetune import FinetuneConfig, full_finetune
from robust_backbones.transfer.linear_probe import linear_probe
from robust_backbones.transfer.protocol import Backbones

LABEL = r"\w[\w.-]*"


@dataclass
class DatasetsOptions:
    """Show which of the twelve data sets are present, which are missing, and where to get them."""

    data_root: Path
    """Folder that holds the data sets, each as NAME/train and NAME/test or as torchvision lays it out."""


@dataclass
class TransferOptions:
    """Options of both modes."""

    dataset: tyro.conf.Positional[str]
    """Name of one of the twelve data sets, or the path of a folder that holds train/ and test/."""
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """One or more backbones."""
    output: Path
    """Folder for the results: LABEL/seed_S/record.json for every backbone and trial."""
    data_root: Path | None = None
    """Folder that holds the data sets."""
    labels: tuple[str, ...] = ()
    """Names of the backbones, in their order; by default those of their files."""
    metric: Literal["", "top1", "mean_per_class"] = ""
    """For a folder of your own; default top1."""
    split: Literal["drawn", "first"] = "drawn"
    """Of caltech101 and caltech256: training images drawn once and for all, or the first 30 and 60 of each class.
    The latter is as in the public code; the data set is then called caltech101_first."""

    @property
    def backbones(self) -> Backbones:
        """As ``linear_probe`` and ``full_finetune`` take them; ``InputError`` where the labels do not fit them."""
        if not self.labels:
            return self.checkpoints
        if len(set(self.labels)) != len(self.checkpoints) or not all(re.fullmatch(LABEL, one) for one in self.labels):
            raise InputError(
                f"--labels needs {plural(len(self.checkpoints), 'name')}, each another one and as folders have: "
                f"got {' '.join(self.labels)}"
            )
        return dict(zip(self.labels, self.checkpoints, strict=True))


@dataclass(kw_only=True)
class ProbeOptions(TransferOptions, DeviceOptions):
    """Linear classifiers on the frozen backbone ("fixed-feature"): all settings, trials and backbones in one pass."""

    config: Annotated[ProbeConfig, tyro.conf.arg(name="")] = field(default_factory=ProbeConfig)
    checkpoint_minutes: float = 1.0
    """Time between states saved for resuming, at ends of epochs."""
    skip_unreadable: bool = False
    """Look at every image first and leave out those that cannot be read, listed in skipped.json; else stop at one."""


@dataclass(frozen=True)
class FinetuneRecipe(FinetuneConfig):
    """Fine-tuning options of the command line; the grid sets the others."""

    lr: tyro.conf.Suppress[float] = 0.01
    weight_decay: tyro.conf.Suppress[float] = 5e-4
    seed: tyro.conf.Suppress[int] = 0


@dataclass
class FinetuneOptions(TransferOptions):
    """Fine-tune the whole network ("full-network"); runs of the grid are kept and resumed one by one."""

    grid: Annotated[TransferConfig, tyro.conf.arg(name="")] = field(default_factory=TransferConfig)
    config: Annotated[FinetuneRecipe, tyro.conf.arg(name="")] = field(default_factory=FinetuneRecipe)
    execution: Annotated[Execution, tyro.conf.arg(name="")] = field(default_factory=Execution)


@dataclass
class TransferTableOptions:
    """One table of finished experiments: mean, range and spread of the trials, and how each was selected."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of experiments."""
    output: Path | None = None
    """Markdown file to write; without it the table is printed."""


COMMANDS = {
    "datasets": DatasetsOptions,
    "probe": ProbeOptions,
    "finetune": FinetuneOptions,
    "table": TransferTableOptions,
}


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if isinstance(options, DatasetsOptions):
        return datasets(options)
    return table(options) if isinstance(options, TransferTableOptions) else transfer(options)


def parse(arguments: list[str]) -> DatasetsOptions | ProbeOptions | FinetuneOptions | TransferTableOptions:
    return cli.parse(COMMANDS, arguments, description=__doc__)


def datasets(options: DatasetsOptions) -> int:
    if not options.data_root.is_dir():
        raise InputError(
            f"no folder {options.data_root}: give the one that holds the data sets, or an empty one to see what to get"
        )
    present = 0
    for row in TRANSFER_DATASETS.values():
        state, detail = check(row, options.data_root)
        present += state == "present"
        print(
            f"{row.name:<10} {state:<8} {row.title}: {row.num_classes} classes, {row.train_images:,} training "
            f"and {row.test_images:,} test images ({row.split}), {row.metric}\n{'':<20}{detail}"
        )
    print(f"{present} of {len(TRANSFER_DATASETS)} data sets are in {options.data_root}")
    return 0


def transfer(options: ProbeOptions | FinetuneOptions) -> int:
    data = open_transfer_data(options.dataset, options.data_root, metric=options.metric, split=options.split)
    if isinstance(options, ProbeOptions):
        check_not_negative(options, "checkpoint_minutes")
        names = ("device", "workers", "checkpoint_minutes", "skip_unreadable")
        execution = {name: getattr(options, name) for name in names}
        with cpu.fast(options.device):
            records = linear_probe(options.backbones, data, options.output, options.config, **execution)
    else:
        recipe = (options.grid, options.config, options.execution)
        with cpu.fast(options.execution.device):
            records = full_finetune(options.backbones, data, options.output, *recipe)
    if is_first_process():
        print(f"\n{classification_table(records).to_markdown()}\n\nrecords and networks written to {options.output}")
    return 0


def table(options: TransferTableOptions) -> int:
    if not options.runs:
        raise InputError("give one or more folders of experiments")
    from robust_backbones.analysis.report import check_complete  # with all that draws

    runs: list[RecordedRun] = []
    for folder in options.runs:
        paths = sorted(folder.glob("*/seed_*/record.json"))
        found = [RecordedRun(path.parent, RunRecord.read(path)) for path in paths]
        if others := [run for run in found if run.record.task != "transfer"]:
            raise InputError(f"{others[0].folder} is of task {others[0].record.task}, no transfer: leave it out")
        if not found:
            raise InputError(f"no finished trial in {folder}: give the --output of `probe` or `finetune`")
        runs += found
    check_complete(runs)
    text = classification_table([run.record for run in runs]).to_markdown()
    if options.output is None:
        print(text)
        return 0
    write_text(options.output, text + "\n")
    print(f"table written to {options.output}")
    return 0
