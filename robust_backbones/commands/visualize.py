r"""Show what backbones see, side by side: units maximised from noise, inverted representations, input gradients.

Examples:
    robust-backbones visualize activation standard=runs/standard/checkpoint.pt robust=runs/robust/checkpoint.pt \
        --units 0 1 2 3 --output runs/activation
    robust-backbones visualize inversion standard=runs/standard/checkpoint.pt robust=runs/robust/checkpoint.pt \
        --data imagenet/val --images 50 --output runs/inversion
    robust-backbones visualize saliency standard=hub:resnet50_l2_eps0 robust=hub:resnet50_l2_eps3 \
        --data imagenet/val --output runs/saliency

A backbone is NAME=PATH or NAME=hub:PUBLISHED, of any source that tools/convert_backbone.py knows, a detector's
model_final.pth too, which has no logits. OUTPUT gets picture.png, numbers.csv (a row an image and backbone) and
record.json, with measures in their own units.
`robust-backbones visualize inversion --help` lists the options of one command.
Exit status: 0 done, 2 bad input. --debug shows tracebacks.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from robust_backbones.analysis.statistics import summarize
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.visualization import (
    LOGITS,
    PENULTIMATE,
    SSIM_WINDOW,
    AscentConfig,
    activation_losses,
    gradients_as_images,
    invert,
    maximize_activation,
    noise,
    pixel_correlation,
    saliency,
    saliency_alignment,
    ssim,
    ssim_library,
)
from robust_backbones.commands import cli
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.folders import FolderImages
from robust_backbones.data.transforms import val_transform
from robust_backbones.errors import InputError
from robust_backbones.models import NormalizedModel
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.identity import claim
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

Row = dict[str, Any]
"""Of numbers.csv: ``image``, ``backbone`` and measures."""


@dataclass(kw_only=True)
class Common:
    """What all commands need."""

    backbones: tyro.conf.Positional[tuple[str, ...]]
    """One or more NAME=PATH; the others are compared with the first."""
    output: Path
    """Folder for the results."""
    image_size: int = 224
    """Side of the images in pixels; best that of the training."""
    seed: int = 0
    """Of the noise, and of which images are taken."""
    batch_size: int = 25
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Activation(Common):
    """Images that maximise a class logit or a unit of any layer, from noise, without regularisation."""

    layer: str = LOGITS
    """logits, penultimate, or a module such as layer3 or layer4.1.conv2; of its channels, the mean over all places."""
    units: tuple[int, ...] = tuple(range(8))
    """Classes or channels."""
    ascent: Annotated[AscentConfig, tyro.conf.arg(name="")] = field(default_factory=AscentConfig)


@dataclass(kw_only=True)
class WithImages(Common):
    """What commands on photographs need."""

    data: Path
    """Folder of images, or of a folder of images (or shards) a class."""
    images: int = 50
    """How many, drawn from all by the seed."""
    val_resize: int = 256
    """Shorter side of images before the central crop of image_size."""
    pictures: int = 8
    """Images in the picture; the numbers are of all."""


@dataclass(kw_only=True)
class Inversion(WithImages):
    """Images found by nothing but the representation of another image, and how like that image they are.

    SSIM and pixel correlation of the image found with the one whose representation it has; distance is that of the
    representations, ‖R(x) - R(target)‖ / ‖R(target)‖. Differences between backbones are paired by image.
    """

    layer: str = PENULTIMATE
    """penultimate, logits, or a module such as layer3 or layer4.1.conv2."""
    start: Literal["noise", "image"] = "noise"
    """Grey noise, or the next of the images."""
    ascent: Annotated[AscentConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: AscentConfig(steps=1000))


@dataclass(kw_only=True)
class Saliency(WithImages):
    """Gradients of the loss with respect to the pixels, and their alignment with the image (Etmann et al. 2019).

    The picture shows those of the cross-entropy of the class that each backbone predicts. alignment is |<x, g>| / ‖g‖,
    of the winning logit's gradient g, with pixels in [0, 1]; cosine is the same over ‖x‖.
    """


Arguments = (
    Annotated[Activation, tyro.conf.subcommand("activation")]
    | Annotated[Inversion, tyro.conf.subcommand("inversion")]
    | Annotated[Saliency, tyro.conf.subcommand("saliency")]
)


@dataclass(frozen=True)
class Photographs:
    names: Sequence[str]
    pixels: Tensor
    """Shape (N, 3, H, W), in [0, 1]."""


@dataclass(frozen=True)
class Result:
    """What a command found."""

    rows: list[Row]
    grid: dict[str, Tensor]
    """Rows of the picture: name -> images of shape (N, 3, H, W), in [0, 1]."""
    titles: list[str]
    """Of its columns; they may have none."""


def main(arguments: list[str]) -> int:
    options: Activation | Inversion | Saliency = cli.parse(Arguments, arguments, description=__doc__)
    check(options)
    checkpoints = {name: read_checkpoint(path).in_rgb() for name, path in named_paths(options.backbones).items()}
    models = {
        name: NormalizedModel(checkpoint.build(), checkpoint.spec).eval().to(options.device)
        for name, checkpoint in checkpoints.items()
    }
    check_layer(options, models)
    if isinstance(options, Activation):
        work, count = partial(activation, options, models), len(options.units)
    else:
        photographs = open_photographs(options)
        command = inversion if isinstance(options, Inversion) else gradients
        work, count = partial(command, options, models, photographs), len(photographs.names)
    identity = {
        **plain(options),
        "command": type(options).__name__.lower(),
        "backbones": {name: checkpoint.source_sha256 for name, checkpoint in checkpoints.items()},
        "data": "noise" if isinstance(options, Activation) else options.data.name,
        "images": count,
    }
    if claim(options.output, identity):
        record = RunRecord.read(options.output / "record.json")
    else:
        began = perf_counter()
        result = work()
        draw_grid(options.output / "picture.png", result.grid, result.titles)
        write_csv(options.output / "numbers.csv", result.rows)
        record = RunRecord(
            run_id=options.output.name,
            task="visualization",
            backbone={name: described(checkpoint) for name, checkpoint in checkpoints.items()},
            threat_model=None,  # each backbone has its own
            dataset=identity["data"],
            metrics=metrics_of(result.rows, list(models), compared=not isinstance(options, Activation)),
            seed=options.seed,
            config=identity,
            seconds=perf_counter() - began,
        )
        record.write(options.output / "record.json")
    what = "units" if isinstance(options, Activation) else "images"
    compared = len(models) > 1 and not isinstance(options, Activation)
    print(f"means over {count} {what}" + ("; differences are paired, with 95 % intervals" if compared else ""))
    print("\n".join(table(record.metrics)))
    print(f"picture.png, numbers.csv and record.json are in {options.output}")
    return 0


def activation(options: Activation, models: Mapping[str, NormalizedModel]) -> Result:
    starts, units = noise(len(options.units), options.image_size, seed=options.seed), torch.tensor(options.units)
    rows: list[Row] = []
    grid: dict[str, Tensor] = {}
    with progress(options, len(models) * len(units) * options.ascent.steps) as bar:
        for name, model in models.items():
            parts = [
                maximize_activation(model, *batch, layer=options.layer, ascent=options.ascent, progress=bar.update)
                for batch in batches(options, starts, units)
            ]
            values, before = joined(parts, "values").tolist(), joined(parts, "start_values").tolist()
            rows += [
                {"image": f"unit {unit}", "backbone": name, "activation": value, "before": start}
                for unit, value, start in zip(options.units, values, before, strict=True)
            ]
            grid[name] = joined(parts, "images")
    what = "class" if options.layer == LOGITS else "unit"
    return Result(rows, grid, [f"{what} {unit}" for unit in options.units])


def inversion(options: Inversion, models: Mapping[str, NormalizedModel], photographs: Photographs) -> Result:
    targets = photographs.pixels
    starts = noise(len(targets), options.image_size, seed=options.seed)
    if options.start == "image":
        starts = targets.roll(-1, 0)
    rows = likeness(photographs, "start", starts, None)
    grid = {"target": targets, "start": starts}
    with progress(options, len(models) * len(targets) * options.ascent.steps) as bar:
        for name, model in models.items():
            parts = [
                invert(model, *batch, layer=options.layer, ascent=options.ascent, progress=bar.update)
                for batch in batches(options, targets, starts)
            ]
            grid[name] = joined(parts, "images")
            rows += likeness(photographs, name, grid[name], joined(parts, "values"))
    return Result(rows, {name: images[: options.pictures] for name, images in grid.items()}, [])


def likeness(photographs: Photographs, backbone: str, images: Tensor, distances: Tensor | None) -> list[Row]:
    """Rows of how like the photographs images are; starts have no distance, as it is another for every backbone."""
    columns = zip(
        photographs.names,
        ssim(images, photographs.pixels).tolist(),
        pixel_correlation(images, photographs.pixels).tolist(),
        [None] * len(images) if distances is None else distances.tolist(),
        strict=True,
    )
    names = ("image", "ssim", "pixel_correlation", "distance")
    return [{"backbone": backbone, **dict(zip(names, values, strict=True))} for values in columns]


def gradients(options: Saliency, models: Mapping[str, NormalizedModel], photographs: Photographs) -> Result:
    rows: list[Row] = []
    grid = {"image": photographs.pixels[: options.pictures]}
    with progress(options, len(models) * len(photographs.names)) as bar:
        for name, model in models.items():
            maps, alignments = [], []
            for (pixels,) in batches(options, photographs.pixels):
                with torch.no_grad():
                    predicted = model(pixels).argmax(1)
                maps.append(gradients_as_images(saliency(model, pixels, predicted)).cpu())
                alignments.append(saliency_alignment(model, pixels))
                bar.update(len(pixels))
            grid[name] = torch.cat(maps)[: options.pictures]
            alpha, cosine = joined(alignments, "alpha").tolist(), joined(alignments, "cosine").tolist()
            rows += [
                {"backbone": name, "image": image, "alignment": length, "cosine": share}
                for image, length, share in zip(photographs.names, alpha, cosine, strict=True)
            ]
    return Result(rows, grid, [])


def progress(options: Common, total: int) -> "tqdm[None]":
    """A bar of images times steps."""
    return tqdm(total=total, desc=type(options).__name__.lower(), unit="step", disable=None, leave=False)


def batches(options: Common, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.to(options.device).split(options.batch_size) for tensor in tensors), strict=True)


def joined(parts: Sequence[object], field_name: str) -> Tensor:
    """One field of all batches, on the CPU."""
    return torch.cat([getattr(part, field_name) for part in parts]).cpu()


def check(options: Activation | Inversion | Saliency) -> None:
    names = ("image_size", "batch_size", "images", "pictures")
    for name in (name for name in names if getattr(options, name, 1) < 1):
        raise InputError(f"--{name.replace('_', '-')} must be > 0, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but no CUDA device was found: give --device cpu")
    if isinstance(options, WithImages) and options.val_resize < options.image_size:
        raise InputError(
            f"--val-resize {options.val_resize} is smaller than the crop, --image-size {options.image_size}"
        )
    if isinstance(options, Activation) and not options.units:
        raise InputError("--units needs one or more numbers of classes or channels")
    if isinstance(options, Inversion):
        ssim_library()  # it says so when it is missing, before anything is computed
        if options.image_size < SSIM_WINDOW:
            raise InputError(f"SSIM needs images of {SSIM_WINDOW} pixels: give a greater --image-size")


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
def check_layer(options: Activation | Inversion | Saliency, models: Mapping[str, NormalizedModel]) -> None:
    """Refuse what a network does not have before anything is written."""
    layer = LOGITS if isinstance(options, Saliency) else options.layer
    units = torch.tensor(options.units if isinstance(options, Activation) else (0,), device=options.device)
    start = noise(1, options.image_size, seed=0).to(options.device).expand(len(units), -1, -1, -1)
    for name, model in models.items():
        try:
            activation_losses(model, units, layer)(start)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def open_photographs(options: WithImages) -> Photographs:
    """From a folder, or from its class folders or shards."""
    folder = options.data
    transform = val_transform(options.image_size, resize=options.val_resize)
    if folder.is_dir() and not any(path.is_dir() or path.suffix == ".tar" for path in folder.iterdir()):
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
        if not names:
            raise InputError(f"no image in {folder}: give a folder of images, or of a folder of images a class")
        dataset = ClassificationDataset(FolderImages(folder, ["any"], [0] * len(names), names), transform)
    else:
        dataset = open_dataset(folder, transform)
    dataset = dataset.sample(options.images, seed=options.seed)
    if isinstance(options, Inversion) and options.start == "image" and len(dataset) < 2:
        raise InputError("--start image needs two images or more: give a greater --images, or --start noise")
    pixels = torch.stack([dataset[place][0] for place in range(len(dataset))])
    return Photographs(dataset.names, pixels.float() / 255)


def metrics_of(rows: Sequence[Row], names: Sequence[str], *, compared: bool) -> dict[str, float | None]:
    """Means over images as ``NAME/MEASURE``, in the measure's own unit.

    ``NAME - FIRST/MEASURE`` is the mean of the paired differences; ``_low`` and ``_high`` end its 95 % t interval.
    """
    measures = [name for name in rows[0] if name not in ("image", "backbone")]
    columns = {
        (name, measure): [row[measure] for row in rows if row["backbone"] == name]
        for name in dict.fromkeys(row["backbone"] for row in rows)
        for measure in measures
    }
    metrics: dict[str, float | None] = {
        f"{name}/{measure}": fmean(values) for (name, measure), values in columns.items() if None not in values
    }
    first, *others = names
    for name in others if compared else []:
        for measure in measures:
            pairs = zip(columns[name, measure], columns[first, measure], strict=True)
            difference = summarize([value - reference for value, reference in pairs])
            key = f"{name} - {first}/{measure}"
            metrics |= {key: difference.mean, f"{key}_low": difference.low, f"{key}_high": difference.high}
    return metrics


def table(metrics: Mapping[str, float | None]) -> list[str]:
    """A line a backbone, and one a difference with its 95 % interval."""
    split = [key.rsplit("/", 1) for key in metrics if not key.endswith(("_low", "_high"))]
    names, measures = (list(dict.fromkeys(column)) for column in zip(*split, strict=True))
    rows = [["", *measures]]
    for name in names:
        cells = [name]
        for key in (f"{name}/{measure}" for measure in measures):
            value, low, high = (metrics.get(f"{key}{end}") for end in ("", "_low", "_high"))
            cells.append("-" if value is None else f"{value:.3f}")
            if low is not None:
                cells[-1] = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw_grid(path: Path, rows: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """Write a PNG with a named row of images for each entry, and a title over each column.

    Args:
        rows: name -> images of shape (N, 3, H, W), in [0, 1].
        titles: N of them, or none.
    """
    side, margin, columns = 1.1, 0.3, len(next(iter(rows.values())))  # inches
    width, height = margin + side * columns, margin * bool(titles) + side * len(rows)
    figure = Figure(figsize=(width, height))
    edges = {"left": margin / width, "right": 1, "bottom": 0, "top": side * len(rows) / height}
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.03, "hspace": 0.03})
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    threat_model = None if checkpoint.threat_model is None else str(checkpoint.threat_model)
    return {**checkpoint.spec.to_dict(), "source_sha256": checkpoint.source_sha256, "threat_model": threat_model}


def plain(options: Common) -> dict[str, Any]:
    """What decides the numbers, for JSON."""
    values = asdict(options)
    ascent = values.pop("ascent", {})
    if ascent.get("ball"):
        ascent["ball"] = str(ThreatModel(**ascent["ball"]))
    if "units" in values:
        values["units"] = list(values["units"])
    other = ("backbones", "output", "data", "device", "pictures")
    return {name: value for name, value in (values | ascent).items() if name not in other}
