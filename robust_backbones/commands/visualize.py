r"""Show what backbones see, side by side: units maximised from noise, inverted representations, input gradients.

Examples:
    robust-backbones visualize activation standard=runs/standard/checkpoint.pt robust=runs/robust/checkpoint.pt \
        --units 0 1 2 3 --output runs/activation
    robust-backbones visualize inversion standard=runs/standard/checkpoint.pt robust=runs/robust/checkpoint.pt \
        --data imagenet/val --images 50 --output runs/inversion
    robust-backbones visualize saliency standard=hub:resnet50_l2_eps0 robust=hub:resnet50_l2_eps3 \
        --data imagenet/val --output runs/saliency

A backbone is NAME=PATH or NAME=hub:PUBLISHED, from any source that `robust-backbones convert` reads, or a detector's
model_final.pth, which has no logits. OUTPUT gets picture.png, numbers.csv (a row per image and backbone) and
record.json, with measures in their own units.
`robust-backbones visualize inversion --help` lists the options of one command.
Exit status: 0 done, 2 bad input, 75 preempted (give the command again). --debug shows tracebacks.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from robust_backbones.analysis.tables import Table
from robust_backbones.analysis.visualization import draw_grid, metrics_of, table
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.compute import available
from robust_backbones.classification.visualization import (
    LOGITS,
    PENULTIMATE,
    AscentConfig,
    Photographs,
    SideBySide,
    activation_losses,
    compare_inversions,
    compare_saliency,
    compare_units,
    noise,
    ssim,
)
from robust_backbones.commands import cli
from robust_backbones.commands.options import DEVICE, Device
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.decoding import is_image, visible
from robust_backbones.data.images import ImageFiles
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import InputError, check_crop, plural
from robust_backbones.models import BackboneSpec, NormalizedModel
from robust_backbones.runs.files import write_text
from robust_backbones.runs.folders import claimed
from robust_backbones.runs.identity import FINGERPRINT
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel


@dataclass(kw_only=True)
class VisualizeOptions:
    """Options of all commands."""

    backbones: tyro.conf.Positional[tuple[str, ...]]
    """One or more NAME=PATH; the others are compared with the first."""
    output: Path
    """Folder for the results."""
    image_size: int | None = None
    """Side of the images in pixels; by default that of the backbones' own evaluation."""
    seed: int = 0
    """Of the noise, and of which images are taken."""
    batch_size: int = 25
    device: Device = DEVICE


@dataclass(kw_only=True)
class ActivationOptions(VisualizeOptions):
    """Images that maximise a class logit or a unit of any layer, from noise, without regularisation."""

    layer: str = LOGITS
    """logits, penultimate, or a module such as layer3 or layer4.1.conv2; of its channels, the mean over all places."""
    units: tuple[int, ...] = tuple(range(8))
    """Classes or channels."""
    ascent: Annotated[AscentConfig, tyro.conf.arg(name="")] = field(default_factory=AscentConfig)


@dataclass(kw_only=True)
class PhotographOptions(VisualizeOptions):
    """Options of commands on photographs."""

    data: Path
    """Folder of images, or with one folder of images (or shards) per class."""
    images: int = 50
    """Number of images, drawn from all by the seed."""
    val_resize: int | None = None
    """Shorter side of images before the central crop of image_size; by default the backbones' own, or as 256 to 224."""
    pictures: int = 8
    """Number of images in the picture; the numbers are over all."""


@dataclass(kw_only=True)
class InversionOptions(PhotographOptions):
    """Images reconstructed from the representation of another image alone, and their similarity to that image.

    SSIM and pixel correlation are between the reconstructed and the original image; distance is between the
    representations, ‖R(x) - R(target)‖ / ‖R(target)‖. Differences between backbones are paired by image.
    """

    layer: str = PENULTIMATE
    """penultimate, logits, or a module such as layer3 or layer4.1.conv2."""
    start: Literal["noise", "image"] = "noise"
    """Grey noise, or the next of the images."""
    ascent: Annotated[AscentConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: AscentConfig(steps=1000))


@dataclass(kw_only=True)
class SaliencyOptions(PhotographOptions):
    """Gradients of the loss with respect to the pixels, and their alignment with the image (Etmann et al. 2019).

    The picture shows gradients of the cross-entropy for the class that each backbone predicts. alignment is |<x, g>| /
    ‖g‖,
    of the winning logit's gradient g, with pixels in [0, 1]; cosine is the same over ‖x‖.
    """


COMMANDS = {"activation": ActivationOptions, "inversion": InversionOptions, "saliency": SaliencyOptions}


def main(arguments: list[str]) -> int:
    options = cli.parse(COMMANDS, arguments, description=__doc__)
    check(options)
    checkpoints = {name: read_checkpoint(path).in_rgb() for name, path in named_paths(options.backbones).items()}
    choose_sizes(options, [checkpoint.spec for checkpoint in checkpoints.values()])
    models = {
        name: NormalizedModel(checkpoint.build(), checkpoint.spec).eval().to(options.device)
        for name, checkpoint in checkpoints.items()
    }
    check_layer(options, models)
    photographs, fingerprint = open_photographs(options) if isinstance(options, PhotographOptions) else (None, "")
    count = len(options.units if photographs is None else photographs.names)
    identity = {
        **settings(options),
        "command": type(options).__name__.removesuffix("Options").lower(),
        "backbones": {name: checkpoint.source_sha256 for name, checkpoint in checkpoints.items()},
        "data": "noise" if photographs is None else options.data.name,
        "images": count,
        FINGERPRINT: fingerprint,
    }
    with claimed(options.output, identity, {"pictures": PhotographOptions.pictures}) as finished:
        if finished:
            record = RunRecord.read(options.output / "record.json")
        else:
            began = perf_counter()
            found = compare(options, models, photographs)
            for name in models if isinstance(options, SaliencyOptions) else ():
                if grey := sum(bool((image == image[0, 0, 0]).all()) for image in found.grid[name]):
                    told = f"the gradient of {grey} of {plural(count, 'image')} is 0: grey in the picture"
                    print(f"warning: {name}: {told}", file=sys.stderr)
            pictures = count if photographs is None else options.pictures
            grid = {name: images[:pictures] for name, images in found.grid.items()}
            draw_grid(options.output / "picture.png", grid, found.titles)
            write_text(options.output / "numbers.csv", Table("", found.rows, {}).to_csv())
            record = RunRecord(
                run_id=options.output.name,
                task="visualization",
                backbone={name: described(checkpoint) for name, checkpoint in checkpoints.items()},
                threat_model=None,  # each backbone has its own
                dataset=identity["data"],
                metrics=metrics_of(found.rows, list(models), compared=photographs is not None),
                seed=options.seed,
                config=identity,
                seconds=perf_counter() - began,
            )
            record.write(options.output / "record.json")
    compared = len(models) > 1 and photographs is not None
    print(f"means over {plural(count, 'unit' if photographs is None else 'image')}", end="")
    print("; differences are paired, with 95 % intervals" if compared else "", end="")
    print(", each of its own scale: numbers.csv has them one by one" if photographs is None and count > 1 else "")
    print("\n".join(table(record.metrics)))
    print(f"picture.png, numbers.csv and record.json are in {options.output}")
    return 0


def compare(options: Any, models: dict[str, NormalizedModel], photographs: Photographs | None) -> SideBySide:
    steps = 1 if isinstance(options, SaliencyOptions) else options.ascent.steps
    count = len(options.units if photographs is None else photographs.names)
    with tqdm(total=len(models) * count * steps, unit="step", disable=None, leave=False) as bar:
        common = {"batch_size": options.batch_size, "progress": bar.update}
        if photographs is None:
            common |= {"layer": options.layer, "ascent": options.ascent, "seed": options.seed}
            return compare_units(models, options.units, options.image_size, **common)
        if isinstance(options, SaliencyOptions):
            return compare_saliency(models, photographs, **common)
        starts = noise(count, options.image_size, seed=options.seed)
        if options.start == "image":
            starts = photographs.pixels.roll(-1, 0)
        return compare_inversions(models, photographs, starts, layer=options.layer, ascent=options.ascent, **common)


def check(options: Any) -> None:
    for name in ("image_size", "batch_size", "images", "val_resize", "pictures"):
        if (value := getattr(options, name, None)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be > 0, got {value}")
    available(options.device)
    if isinstance(options, ActivationOptions) and not options.units:
        raise InputError("--units needs one or more numbers of classes or channels")


def choose_sizes(options: Any, specs: Sequence[BackboneSpec]) -> None:
    """Fill in the sizes that are not given, and refuse those that cannot be, before anything is computed."""
    own, resizes = {spec.image_size for spec in specs}, {spec.val_resize for spec in specs}
    if options.image_size is None:
        if len(own) > 1:
            sizes = " and ".join(map(str, sorted(own)))
            raise InputError(f"the backbones were made for images of {sizes} pixels: give --image-size")
        (options.image_size,) = own
    if isinstance(options, PhotographOptions):
        if options.val_resize is None:
            usual = round(options.image_size * 256 / 224)
            options.val_resize = resizes.pop() if own == {options.image_size} and len(resizes) == 1 else usual
        check_crop(options)
    if isinstance(options, InversionOptions):
        blank = torch.zeros(1, 3, options.image_size, options.image_size)
        ssim(blank, blank)  # refuses what it cannot measure, before anything is computed


def named_paths(backbones: Sequence[str]) -> dict[str, Path]:
    """``["standard=a.pt", "robust=b.pt"]`` -> name -> path."""
    if not backbones:
        raise InputError("give one or more backbones as NAME=PATH, such as standard=runs/standard/checkpoint.pt")
    paths: dict[str, Path] = {}
    for text in backbones:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InputError(f"cannot read the backbone {text!r}: write NAME=PATH, as in robust=runs/r/checkpoint.pt")
        if name in (*paths, "start", "target", "image"):
            raise InputError(f"the name {name} is taken: give {text} another one")
        paths[name] = Path(path)
    return paths


@torch.no_grad()
def check_layer(options: Any, models: Mapping[str, NormalizedModel]) -> None:
    """Refuse a layer that a network does not have, before anything is written."""
    layer = LOGITS if isinstance(options, SaliencyOptions) else options.layer
    units = torch.tensor(options.units if isinstance(options, ActivationOptions) else (0,), device=options.device)
    start = noise(1, options.image_size, seed=0).to(options.device).expand(len(units), -1, -1, -1)
    for name, model in models.items():
        try:
            activation_losses(model, units, layer)(start)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        except (AssertionError, RuntimeError) as error:  # as a ViT's, of other images than it was made for
            raise InputError(f"{name} takes no images of this size ({error}): give another --image-size") from None


def open_photographs(options: Any) -> tuple[Photographs, str]:
    """Photographs from a folder, its class folders or shards, with their fingerprint."""
    folder = options.data
    transform = val_transform(options.image_size, resize=options.val_resize)
    if folder.is_dir() and not any(path.is_dir() or path.suffix == ".tar" for path in visible(folder)):
        names = [path.name for path in visible(folder) if is_image(path.name)]
        if not names:
            raise InputError(f"no image in {folder}: give a folder of images, or of a folder of images a class")
        dataset = ClassificationDataset(ImageFiles(folder, ["any"], [0] * len(names), names), transform)
    else:
        dataset = open_dataset(folder, transform)
    dataset = dataset.sample(options.images, seed=options.seed)
    if isinstance(options, InversionOptions) and options.start == "image" and len(dataset) < 2:
        raise InputError("--start image needs two images or more: give a greater --images, or --start noise")
    pixels = torch.stack([dataset[place][0] for place in range(len(dataset))])
    return Photographs(dataset.names, pixels.float() / 255), dataset.fingerprint()


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    fields = checkpoint.record_fields()
    return {**fields["backbone"], "threat_model": fields["threat_model"]}


def settings(options: VisualizeOptions) -> dict[str, Any]:
    """The settings that determine the numbers, for JSON."""
    values = asdict(options)
    ascent = values.pop("ascent", {})
    if ascent.get("ball"):
        ascent["ball"] = str(ThreatModel(**ascent["ball"]))
    if "units" in values:
        values["units"] = list(values["units"])
    other = ("backbones", "output", "data", "device")
    return {name: value for name, value in (values | ascent).items() if name not in other}
