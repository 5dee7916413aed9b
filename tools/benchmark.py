#!/usr/bin/env python
r"""Benchmarks whose numbers the README quotes: what adversarial training buys, and what the fast paths save.

Examples:
    python tools/benchmark.py robustness --data cifar10 --output runs/cifar10
    python tools/benchmark.py throughput --data imagenet --output runs/throughput
    python tools/benchmark.py probe --data caltech101 --output runs/probe_cost
    python tools/benchmark.py attack --output runs/attack_cost

robustness trains a ResNet-18 on 32 px images twice with one budget, without and with PGD at Linf 8/255, and measures
both against PGD-20, with 95 % intervals; it goes on where it was cut off. throughput times training steps and image
loading in ways that take turns, so that a busy machine slows all of them, and quotes ratios. probe counts the processor
seconds of a linear probe's grid, trained in one pass and by a run for every head, which must give the same weights.
attack times a step of each attack on a Mask R-CNN against a training forward and backward pass on the same image.
--debug shows tracebacks.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import tyro

from robust_backbones import cli
from robust_backbones.analysis.plots import accuracy_curves
from robust_backbones.analysis.tables import markdown, robustness_table
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoints import Checkpoint
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.decoding import ResizedCache
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import augmentation, train_transform, val_transform
from robust_backbones.engine import COMPILE_MODES, Compute, Learner
from robust_backbones.errors import ProofFailedError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.objectives import ObjectiveConfig
from robust_backbones.pretrain import PretrainConfig, pretrain
from robust_backbones.records import RunRecord, atomic_path, versions, write_json
from robust_backbones.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.sources import read_checkpoint
from robust_backbones.threat_models import ThreatModel
from robust_backbones.training import Execution
from robust_backbones.transfer.linear_probe import ProbeConfig, linear_probe, order_of
from robust_backbones.transfer.networks import DEPTH, new_classifier, with_classifier
from robust_backbones.transfer.protocol import Setting

ROOT = Path(__file__).resolve().parents[1]
ROBUSTNESS = PretrainConfig(
    eval_threat_model=ThreatModel("Linf", 8 / 255),
    arch="resnet18",
    eval_attack=AttackConfig(steps=20, relative_step_size=0.25, random_start=True),
    epochs=4,
    batch_size=64,
    lr=0.1,
    schedule="one_cycle",
    weight_decay=5e-4,
    augmentation="padded_crop",
    image_size=32,
    val_resize=32,
    precision="bf16",
    eval_images=1000,
)


@dataclass
class Robustness:
    """Train with and without an adversary on one budget; a table and the curves of both."""

    data: Path
    """Folder that holds train/ and val/ with images of 32 px."""
    output: Path
    """Folder for both runs, table.md and curves.png."""
    epochs: int = ROBUSTNESS.epochs
    batch_size: int = ROBUSTNESS.batch_size
    stem: str = ROBUSTNESS.stem
    """cifar costs ten times the arithmetic of imagenet, and is what 32 px images deserve."""
    images: int = 2000
    """Validation images of the final measurement; the curves are on 1000."""
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 1


@dataclass
class Throughput:
    """Time the training step's variants and the ways to load images, in turns."""

    data: Path
    """Folder that holds train/ with images of the size that training crops from."""
    output: Path
    """Folder for throughput.json and table.md."""
    arch: str = "resnet50"
    image_size: int = 224
    batch_size: int = 16
    rounds: int = 3
    """Turns of each variant; the table gives medians."""
    images: int = 64
    """Images that a turn of loading takes."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Probe:
    """Cost of a linear probe of 2 learning rates x 3 seeds: one pass for all heads against one run for each."""

    data: Path
    """Folder that holds train/ and test/."""
    output: Path
    """Folder for probe.json and table.md."""
    arch: str = "resnet50"
    image_size: int = 224
    images: int = 128
    """Training images."""
    test_images: int = 64
    epochs: int = 2
    batch_size: int = 64
    rounds: int = 3
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Attack:
    """Cost of a step of the attacks on a detector, in units of its plain training forward and backward pass."""

    output: Path
    """Folder for attack.json and table.md."""
    config: Path = ROOT / "detectron_configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    """Its weights are random, and so is the image."""
    size: tuple[int, int] = (192, 256)
    """Height and width of the image."""
    steps: int = 2
    """Of each turn."""
    rounds: int = 5
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


Arguments = (
    Annotated[Robustness, tyro.conf.subcommand("robustness")]
    | Annotated[Throughput, tyro.conf.subcommand("throughput")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Attack, tyro.conf.subcommand("attack")]
)


def main(arguments: list[str]) -> int:
    options = cli.parse(Arguments, arguments, description=__doc__)
    match options:
        case Robustness():
            return robustness(options)
        case Throughput():
            return throughput(options)
        case Probe():
            return probe(options)
        case _:
            return attack(options)


def robustness(options: Robustness) -> int:
    threat_model = ROBUSTNESS.evaluated_at
    execution = Execution(device=options.device, workers=options.workers)
    folders, records = {}, {}
    for name, trained_at in (("standard", ThreatModel()), ("robust", threat_model)):
        print(f"== {name} training ({trained_at})", flush=True)
        folders[name] = options.output / name
        config = replace(
            ROBUSTNESS,
            threat_model=trained_at,
            epochs=options.epochs,
            batch_size=options.batch_size,
            stem=options.stem,
            seed=options.seed,
        )
        training = pretrain(config, options.data, folders[name], execution)
        evaluation = evaluate_robustness(
            RobustnessConfig(
                threat_model,
                ROBUSTNESS.eval_attack,
                autoattack=False,
                limit=options.images,
                image_size=32,
                val_resize=32,
            ),
            read_checkpoint(folders[name] / "checkpoint.pt"),
            options.data / "val",
            options.output / f"{name}_evaluation",
            device=options.device,
            workers=options.workers,
        )
        records[name] = (training, evaluation)
    accuracy_curves(folders, options.output / "curves.png")
    return _write_table(robustness_table(records), options.output, "the curves are in curves.png beside it")


def throughput(options: Throughput) -> int:
    rows = [*_time_steps(options), *_time_loading(options)]
    write_json(options.output / "throughput.json", {"rows": rows, "versions": versions(), "options": _plain(options)})
    cells = [[row["what"], f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}x"] for row in rows]
    table = markdown(["variant", "img/s", "ratio"], cells)
    return _write_table(table, options.output, "the record is throughput.json beside it")


def _time_steps(options: Throughput) -> list[dict]:
    """PGD-3 training steps of the same network: the plain loop first, which the ratios refer to."""
    device = torch.device(options.device)
    images = torch.randint(0, 256, (options.batch_size, 3, options.image_size, options.image_size), dtype=torch.uint8)
    batch = [(images, torch.arange(options.batch_size) % 10)]
    variants: dict[str, Callable[[], None]] = {"step: plain PyTorch fp32": _plain_step(options, device, batch[0])}
    ways = [("fp32", "", ""), ("fp32", "bf16", ""), ("bf16", "", "")]
    if device.type == "cuda":  # compiling is for GPUs
        ways += [("bf16", "", mode) for mode in COMPILE_MODES]
    for precision, attack_precision, mode in ways:
        learner = _learner(options, Compute(device, precision, attack_precision, mode))
        name = f"step: {precision}, folded attack in {attack_precision or precision}"
        variants[name + f", compiled ({mode})" * bool(mode)] = lambda learner=learner: learner.step(batch)
    return _in_turns(variants, options.batch_size, options.rounds, device)


def _network(options: Throughput, device: torch.device) -> NormalizedModel:
    spec = BackboneSpec(options.arch, 10)
    return NormalizedModel(build_backbone(spec), spec).to(device)


def _learner(options: Throughput, compute: Compute) -> Learner:
    model = _network(options, compute.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    objective = ObjectiveConfig().build(AttackConfig())
    return Learner(model, optimizer, scheduler, objective, ThreatModel("L2", 3.0), compute)


def _plain_step(options: Throughput, device: torch.device, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable:
    """The step as one writes it first: the network itself in eval mode, default memory layout, nothing folded."""
    model, loss_of = _network(options, device), torch.nn.functional.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = batch[0].to(device) / 255, batch[1].to(device)

    def step() -> None:
        model.eval()
        delta = torch.zeros_like(images)
        for _ in range(3):
            delta.requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(model(images + delta), labels), delta)
            delta = delta.detach() + 2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            delta = delta * (3 / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
            delta = (images + delta).clamp(0, 1) - images
        model.train()
        optimizer.zero_grad()
        loss_of(model(images + delta), labels).backward()
        optimizer.step()

    return step


def _time_loading(options: Throughput) -> list[dict]:
    """One process that decodes and augments: Pillow first, which the ratios refer to."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = train_transform(options.image_size, min_crop_scale=0.08)
    pillow = ImageFolder(str(options.data / "train"), v2.Compose([transform, v2.PILToTensor()]))
    cache = ResizedCache(options.output / "cache", 256)
    ours = open_dataset(options.data / "train", transform)
    cached = open_dataset(options.data / "train", transform, cache=cache)
    count = min(options.images, len(ours))
    for index in range(count):
        cached.load(index)

    def all_of(dataset) -> Callable[[], None]:
        return lambda: [dataset[index] for index in range(count)] and None

    variants = {
        "loading: Pillow": all_of(pillow),
        "loading: ours": all_of(ours),
        "loading: ours, cache of 256 px": all_of(cached),
    }
    return _in_turns(variants, count, options.rounds, torch.device("cpu"))


def probe(options: Probe) -> int:
    """Decoding and augmentation are the same on both sides; the other is a frozen network in plain PyTorch."""
    checkpoint = _random_checkpoint(options)
    size, resize = options.image_size, round(options.image_size * 256 / 224)
    data = open_transfer_data(str(options.data), None, val_transform(size, resize=resize))
    data = replace(
        data, train=data.train.sample(options.images, seed=0), test=data.test.sample(options.test_images, seed=0)
    )
    config = ProbeConfig(
        select_on="test", epochs=options.epochs, batch_size=options.batch_size, image_size=size, val_resize=resize
    )
    heads: dict[str, list[torch.Tensor]] = {}

    def in_one_pass(name: str, precision: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            way = replace(config, precision=precision)
            linear_probe(way, {"net": checkpoint}, data, Path(folder), device=options.device, workers=0)
            trials = sorted(Path(folder).glob("net/*/checkpoint.pt"))
            heads[name] = [read_checkpoint(path).state_dict["fc.weight"] for path in trials]
            selected = RunRecord.read(trials[0].with_name("record.json")).config["selection"]["selected"]
            heads["selected"] = [s for s in config.settings if str(s) == selected]

    def one_by_one() -> None:
        grid = [(setting, seed) for setting in config.settings for seed in config.seeds]
        heads["one by one"] = [_probe_alone(options, config, checkpoint, data, *place) for place in grid]

    names = ["a run for each head, fp32", "one pass for all heads, fp32", "one pass for all heads, bf16"]
    runs = [one_by_one, lambda: in_one_pass("fp32", "fp32"), lambda: in_one_pass("bf16", "bf16")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, run in zip(names, runs, strict=True):
            clock = time.perf_counter if options.device == "cuda" else time.process_time
            start = clock()
            run()
            seconds[name].append(clock() - start)
            if name == names[1]:
                first = config.settings.index(heads["selected"][0]) * len(config.seeds)
                alone = heads["one by one"][first : first + len(config.seeds)]
                gap = max(float((a - b).abs().max()) for a, b in zip(alone, heads["fp32"], strict=True))
                if gap > 1e-5:
                    raise ProofFailedError(f"the ways do not give the same weights: they differ by {gap:.1e}")
    rows = [
        {
            "what": name,
            "seconds": times,
            "ratio": median(a / b for a, b in zip(seconds[names[0]], times, strict=True)),
        }
        for name, times in seconds.items()
    ]
    content = {"rows": rows, "largest_difference": gap, "versions": versions(), "options": _plain(options)}
    write_json(options.output / "probe.json", content)
    unit = "seconds" if options.device == "cuda" else "processor seconds"
    cells = [[row["what"], f"{median(row['seconds']):.1f}", f"{row['ratio']:.1f}x"] for row in rows]
    print(f"weights of both ways in fp32 differ by {gap:.1e} at most")
    return _write_table(markdown(["way", unit, "ratio"], cells), options.output, "the record is probe.json beside it")


def _random_checkpoint(options: Probe) -> Checkpoint:
    """Time does not depend on the weights."""
    spec = BackboneSpec(options.arch, 10)
    return Checkpoint(spec, build_backbone(spec).state_dict(), None, "robust_backbones", "random", "")


def _probe_alone(
    options: Probe, config: ProbeConfig, checkpoint: Checkpoint, data: TransferData, setting: Setting, seed: int
) -> torch.Tensor:
    """One run as one writes it first: a frozen network with a new classifier, trained for one setting and seed."""
    classifier = new_classifier(checkpoint.spec, len(data.train.classes), seed=seed)
    model = with_classifier(checkpoint, classifier, freeze=DEPTH).to(options.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=config.momentum, weight_decay=setting.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step)
    transform = augmentation(config.augmentation, config.image_size, min_crop_scale=config.min_crop_scale)
    model.train()
    for epoch in range(config.epochs):
        images = data.train.seen_through(transform, epoch=epoch, seed=config.data_seed)
        for batch in order_of(seed, epoch, len(images)).split(config.batch_size):
            if len(batch) < config.batch_size:
                break
            pixels, labels = zip(*(images[position] for position in batch.tolist()), strict=True)
            logits = model(torch.stack(pixels).to(options.device) / 255)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels, device=options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        for batch in torch.arange(len(data.test)).split(config.batch_size):
            model(torch.stack([data.test[position][0] for position in batch.tolist()]).to(options.device) / 255)
    return model.state_dict()["backbone.fc.weight"].cpu()


def attack(options: Attack) -> int:
    import robust_backbones.detection  # noqa: F401  # first: it says so when Detectron2 is missing

    # isort: split
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    from robust_backbones.attacks import ascend
    from robust_backbones.detection.attacks import LOSSES, DetectorAttack, frozen_losses, loss_function
    from robust_backbones.detection.config import load_config

    torch.manual_seed(0)
    model = build_model(load_config(options.config, ["MODEL.DEVICE", options.device])).train()
    height, width = options.size
    shares = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9], [0.2, 0.6, 0.4, 0.8]])
    boxes = shares * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.arange(3), gt_masks=BitMasks(masks))
    sample = {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), "instances": instances}
    image = sample["image"][None].to(model.device) / 255

    def train() -> None:
        for _ in range(options.steps):
            with EventStorage():
                sum(model([sample]).values()).backward()
            model.zero_grad()

    def ascend_by(loss: str) -> None:
        config = DetectorAttack(threat_model=ThreatModel("Linf", 4 / 255), loss=loss, steps=options.steps)
        with frozen_losses(model):
            ascend(loss_function(model, sample, config), image, config.threat_model, config)

    variants: dict[str, Callable[[], None]] = {"training, forward and backward": train}
    variants |= {f"attack step, {loss} loss": lambda loss=loss: ascend_by(loss) for loss in LOSSES if loss != "mask"}
    if model.roi_heads.mask_on:
        variants["attack step, mask loss"] = lambda: ascend_by("mask")
    rows = _in_turns(variants, options.steps, options.rounds, torch.device(options.device))
    write_json(options.output / "attack.json", {"rows": rows, "versions": versions(), "options": _plain(options)})
    cells = [[row["what"], f"{1000 / row['images_per_second']:.0f}", f"{1 / row['ratio']:.2f}x"] for row in rows]
    table = markdown(["pass", "ms", "cost"], cells)
    return _write_table(table, options.output, "the record is attack.json beside it")


def _in_turns(variants: dict[str, Callable[[], None]], images: int, rounds: int, device: torch.device) -> list[dict]:
    """Images a second of each variant, and how many times the first one's that is; the first turns warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    warm_up = (
        3 if device.type == "cuda" else 1
    )  # CUDA graphs are captured in the second call and replayed from the third
    for turn in range(warm_up + rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(variants))]
    return [
        {
            "what": name,
            "images_per_second": images / median(times),
            # Of the same turn: what slows the machine slows both.
            "ratio": median(a / b for a, b in zip(first, times, strict=True)),
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def _plain(options: Throughput | Probe | Attack) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _write_table(table: str, output: Path, rest: str) -> int:
    with atomic_path(output / "table.md") as temporary:
        temporary.write_text(table + "\n")
    print(f"\n{table}\n\ntable written to {output / 'table.md'}; {rest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
