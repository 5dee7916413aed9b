r"""Measure how much robustness survives fine-tuning: ImageNet-RIB's protocol, for any backbone and data sets.

Example, without ImageNet's variants:
    robust-backbones inheritance make-sets tiny-imagenet-100/val --output sets \
        --kinds sketch cartoon gaussian_noise-3 fog-3
    robust-backbones inheritance run runs/tiny_r18/checkpoint.pt --pretraining tiny-imagenet-100 --sets sets/* \
        --methods fine_tuning linear_probe lwf wise_ft --output runs/inheritance --image-size 64 --val-resize 64
    robust-backbones inheritance table runs/inheritance --output runs/inheritance_tables

Example, with them, their folders in data/:
    robust-backbones inheritance run hub:resnet50_l2_eps3 --pretraining imagenet --data-root data --sets imagenet-v2 \
        imagenet-a imagenet-r imagenet-sketch imagenet-cartoon imagenet-drawing objectnet imagenet-c --output runs/rib

Example, a fine-tuned network under corruptions, relative to the one before:
    robust-backbones inheritance corruptions runs/r50/checkpoint.pt --data imagenet/val --output runs/r50_c
    robust-backbones inheritance corruptions runs/inheritance/r50/fine_tuning/sketch/seed_0/checkpoint.pt \
        --data imagenet/val --output runs/r50_sketch_c --reference runs/r50_c/record.json

Example, a detector's backbone with its classifier:
    robust-backbones inheritance detector runs/voc_robust/model_final.pth runs/robust/checkpoint.pt \
        --data imagenet/val --threat-model L2:0.5 --no-autoattack --output runs/voc_robust_inheritance

`corruptions` evaluates a classifier under the 15 common corruptions; `detector` evaluates a detector's backbone with
its former classifier, clean and attacked. `robust-backbones inheritance run --help` lists the options of a command.
Exit status: 0 done, 1 training failed, 2 bad input, 75 preempted (give the command again). --debug shows tracebacks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from robust_backbones import cpu
from robust_backbones.analysis import inheritance as analysis
from robust_backbones.analysis.tables import Table
from robust_backbones.classification.robustness import RobustnessConfig
from robust_backbones.commands import cli
from robust_backbones.commands.options import DeviceOptions, EvaluationOptions
from robust_backbones.errors import InputError, check_not_negative, check_seeds, plural
from robust_backbones.runs.files import write_text
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.corruptions import CorruptionConfig, evaluate_corruptions
from robust_backbones.transfer.inheritance.detectors import compare_with_detector
from robust_backbones.transfer.inheritance.make_sets import check_kind, make_set
from robust_backbones.transfer.inheritance.matrix import read_matrices
from robust_backbones.transfer.inheritance.run import DEFAULT_METHODS, run_protocol
from robust_backbones.transfer.inheritance.sets import KNOWN_SETS


@dataclass(kw_only=True)
class InheritanceOptions(DeviceOptions):
    """Evaluate on every set, fine-tune on one, evaluate on every set again, for each set, method and seed.

    Several processes may be given the same command: they share the work. Methods, seeds and backbones may be added to
    an output later.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """One or more backbones with their classifiers: checkpoints of any source, or hub:NAME."""
    pretraining: Path
    """Folder of the data set of pre-training, with train/ and val/."""
    sets: tuple[str, ...]
    """Two or more related sets: folders whose class folders are classes of pre-training, or names in --data-root:
    imagenet-v2, -a, -r, -sketch, -cartoon, -drawing, -c or objectnet, the eight of ImageNet-RIB."""
    output: Path
    """Folder for the results: LABEL/METHOD/SET/seed_S/record.json."""
    config: Annotated[InheritanceConfig, tyro.conf.arg(name="")] = field(default_factory=InheritanceConfig)
    memory_gb: float = 8.0
    """Memory for decoded images, each of which is decoded once; sets that do not fit are decoded at every use."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """fine_tuning linear_probe lp_ft lwf ewc l2_init l2_sp lora visual_prompt wise_ft uniform_soup greedy_soup;
    wise_ft_0.3 is WiSE-FT at another alpha than 0.5."""
    seeds: tuple[int, ...] = (0,)
    data_root: Path | None = None
    """Folder that holds the sets that are named."""


@dataclass
class InheritanceTableOptions:
    """RI, mRI, the accuracy matrices and their figures, and the relation of distances to forgetting."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Outputs of `run`, finished or not."""
    output: Path
    """Folder for tables (Markdown and CSV) and figures (SVG, PNG and their numbers as CSV)."""
    methods: tuple[str, ...] = ()
    """Only these; by default all."""


@dataclass
class MakeSetsOptions:
    """Related data sets from a folder of images: sketched, cartooned, or under a corruption at a severity.

    If sets share photographs, a network may recognise images of one from another. With --disjoint no two share any, and
    the kind photograph gives a validation set of the remaining ones.
    """

    source: tyro.conf.Positional[Path]
    """Folder that holds one folder of images a class."""
    output: Path
    """Folder for the sets, each a folder with the name of its kind."""
    kinds: tuple[str, ...]
    """sketch, cartoon, photograph (unchanged), or CORRUPTION-SEVERITY, such as fog-3."""
    images_per_class: int = 0
    """Number of images of each class; 0: all."""
    disjoint: bool = False
    """Make each set from different photographs, --images-per-class of them."""
    seed: int = 0
    """Of the corruptions, and of which images are taken."""
    workers: int = 2


@dataclass(kw_only=True)
class CorruptionsOptions(EvaluationOptions):
    """Accuracy of a classifier under the 15 common corruptions at 5 severities, and mCE against a reference."""

    config: Annotated[CorruptionConfig, tyro.conf.arg(name="")] = field(default_factory=CorruptionConfig)
    reference: Path | None = None
    """record.json of another network on the same images, whose errors mCE is relative to."""


@dataclass(kw_only=True)
class DetectorInheritanceOptions(DeviceOptions):
    """Accuracy of a backbone with its own classifier, clean and attacked, before and after detection training."""

    detector: tyro.conf.Positional[Path]
    """The detector's checkpoint, such as its run's model_final.pth."""
    checkpoint: tyro.conf.Positional[Path]
    """The pre-training checkpoint that it started from."""
    data: Path
    """Folder that holds one folder of images a class."""
    output: Path
    """Folder for the results: before/ and after/, as `robust-backbones evaluate classifier` writes them."""
    config: Annotated[RobustnessConfig, tyro.conf.arg(name="")]


def main(arguments: list[str]) -> int:
    commands: dict[str, tuple[type, Callable[[Any], int]]] = {
        "run": (InheritanceOptions, run),
        "table": (InheritanceTableOptions, table),
        "make-sets": (MakeSetsOptions, make_sets),
        "corruptions": (CorruptionsOptions, corruptions),
        "detector": (DetectorInheritanceOptions, detector),
    }
    options = cli.parse({name: kind for name, (kind, _) in commands.items()}, arguments, description=__doc__)
    return next(function for kind, function in commands.values() if isinstance(options, kind))(options)


def run(options: InheritanceOptions) -> int:
    if not (options.methods and options.seeds):
        raise InputError("--methods and --seeds need one or more each")
    check_not_negative(options, "memory_gb")
    check_seeds(options)
    sets = {}
    for name in options.sets:
        folder = Path(name)
        if name in KNOWN_SETS and not folder.is_dir():
            if options.data_root is None:
                raise InputError(f"{name} is a name, so that its folder must be in --data-root: give that")
            folder = options.data_root / name
        sets[folder.name] = folder
    if len(sets) < len(options.sets):
        raise InputError("two sets have one name: rename a folder")
    inputs = (options.checkpoints, options.pretraining, sets, options.output, options.config)
    names = ("methods", "seeds", "device", "workers", "memory_gb")
    with cpu.fast(options.device):
        records = run_protocol(*inputs, **{name: getattr(options, name) for name in names})
    print(f"\n{analysis.summary_table(read_matrices([options.output])).to_markdown()}\n")
    print(f"{plural(len(records), 'record')} written to {options.output}")
    return 0


def table(options: InheritanceTableOptions) -> int:
    if not options.runs:
        raise InputError("give one or more outputs of `run`")
    matrices = read_matrices(options.runs)
    if options.methods:
        matrices = [one for one in matrices if one.method in options.methods]
    if not matrices:
        what = f"nothing has been fine-tuned{' by ' * bool(options.methods)}{', '.join(options.methods)}"
        raise InputError(f"{what} in {', '.join(map(str, options.runs))} yet: `run` it")
    tables = {"inheritance": analysis.summary_table(matrices)}
    if found := analysis.correlations(matrices):
        tables["correlations"] = analysis.correlation_table(found)
    text = "\n\n".join(one.to_markdown() for one in tables.values())
    write_text(options.output / "inheritance.md", text + "\n")
    for name, one in {**tables, "accuracies": analysis.accuracy_table(matrices)}.items():
        write_text(options.output / f"{name}.csv", one.to_csv())
    for label in dict.fromkeys(one.label for one in matrices):
        of_label = [one for one in matrices if one.label == label]
        analysis.change_figure(of_label, options.output / f"{label}_changes")
        if any(one.distances for one in of_label):
            analysis.distance_figure(of_label, options.output / f"{label}_distances")
    print(f"{text}\n\ntables and figures written to {options.output}")
    return 0


def make_sets(options: MakeSetsOptions) -> int:
    check_not_negative(options, "images_per_class", "workers")
    if not options.kinds or len(set(options.kinds)) < len(options.kinds):
        raise InputError("--kinds needs one or more different kinds of sets, such as sketch fog-3")
    for kind in options.kinds:
        check_kind(kind)
    if options.disjoint and not options.images_per_class:
        raise InputError("--disjoint needs to know how many images a set takes: give --images-per-class")
    # The last of disjoint sets needs the most photographs: where they are too few, it says so before one is made.
    for place, kind in reversed(list(enumerate(options.kinds))):
        count = make_set(
            options.source,
            options.output,
            kind,
            images_per_class=options.images_per_class,
            skip=place * options.images_per_class * options.disjoint,
            seed=options.seed,
            workers=options.workers,
        )
        print(f"{kind}: {plural(count, 'image')}", flush=True)
    print(f"{plural(len(options.kinds), 'set')} written to {options.output}")
    return 0


def corruptions(options: CorruptionsOptions) -> int:
    reference = None if options.reference is None else RunRecord.read(options.reference)
    inputs = (options.checkpoint, options.data, options.output, options.config)
    record = evaluate_corruptions(*inputs, reference=reference, device=options.device, workers=options.workers)
    print(f"clean {record.metrics['accuracy/clean']:.1f} %, mean over 75 {record.metrics['mean_accuracy']:.1f} %")
    if reference is not None:
        print(f"mCE {record.metrics['mCE']:.1f}, relative to {reference.run_id}, which has 100")
    print(f"record written to {options.output / 'record.json'}")
    return 0


def detector(options: DetectorInheritanceOptions) -> int:
    inputs = (options.detector, options.checkpoint, options.data, options.output, options.config)
    records = compare_with_detector(*inputs, device=options.device, workers=options.workers)
    rows = []
    for name, value in records[0].metrics.items():
        if name.endswith("_accuracy") and value is not None:
            cells = [
                f"{of[name]:.1f} ({of[f'{name}_low']:.1f} to {of[f'{name}_high']:.1f})"
                for of in (record.metrics for record in records)
            ]
            rows.append([name.removesuffix("_accuracy"), *cells])
    print(f"{plural(records[0].config['images'], 'image')}, {records[0].config['threat_model']}")
    print(Table.of(["accuracy (95 % interval)", "before", "after"], rows).to_markdown())
    print(f"records written to {options.output}")
    return 0
