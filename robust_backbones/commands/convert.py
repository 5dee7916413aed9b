"""Convert a backbone to Detectron2's format, and prove that its features did not change.

Examples:
    robust-backbones convert runs/robust/checkpoint.pt robust.pkl
    robust-backbones convert hub:resnet50_l2_eps3 resnet50_l2_eps3.pkl --image photo.jpg
    robust-backbones convert robust.pkl robust.pth --to torchvision
    robust-backbones convert robust.pkl robust --to timm --push USER/NAME

SRC is a checkpoint that holds a ResNet, ConvNeXt, Swin, ViT or another network of timm, whatever wraps it: of
`pretrain`, MadryLab's robustness library, RobustBench, ARES, torchvision, timm, transformers, self-supervised training,
Lightning, MMDetection, Detectron2 and others; or hub:NAME, one of the published robust backbones. If it holds several
networks, --key or --prefix chooses one. What SRC does not say about its input, you say with options, or it is assumed
and marked as assumed; --source names the layout if the keys do not show it. No code in SRC is run. DST is a .pkl, .pth
or .safetensors; it describes the backbone (architecture, mean, std, threat model, sha256 of SRC), and `train` checks
this against its configuration. Exit status: 0 done, 1 the proof failed, 2 bad input.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from robust_backbones.analysis.tables import Table
from robust_backbones.checkpoint.convert import SUFFIXES, BackboneMetadata, convert_file, write_torchvision
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.hub import WEIGHTS, describe, is_repository, push, write_timm
from robust_backbones.checkpoint.sources import HUB, SOURCES, Statement, read_checkpoint
from robust_backbones.checkpoint.zoo import find
from robust_backbones.commands import cli
from robust_backbones.configs import CONFIG_DIR, as_arguments, find_file
from robust_backbones.errors import InputError, MissingPackageError, ProofFailedError
from robust_backbones.runs.files import atomic_path, write_text
from robust_backbones.threat_models import ThreatModel

BASE_CONFIG = CONFIG_DIR / "Base-RCNN-FPN.yaml"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    say = partial(print, file=sys.stderr) if options.json else print
    checkpoint = read(options)
    spec, threat_model = checkpoint.spec, checkpoint.threat_model or "unknown"
    described = SOURCES[checkpoint.layout].description
    say(f"{options.src}: {described}, {spec.arch}, threat model {threat_model}")
    say(f"input: {checkpoint.reading()}")
    if options.src.startswith(HUB) and not is_repository(options.src.removeprefix(HUB)):
        say(f"sha256 {checkpoint.source_sha256} ({find(options.src.removeprefix(HUB)).pinning})")
    result: dict[str, Any] = {"output": str(options.dst), "metadata": BackboneMetadata.of(checkpoint).to_dict()}

    if options.to != "detectron2":
        write: Callable[[Path, Checkpoint], None] = write_torchvision
        if options.to == "timm":
            checkpoint, write = checkpoint.in_rgb(), write_timm
        with atomic_path(options.dst if options.dst.suffix else options.dst / WEIGHTS) as unproven:
            write(unproven, checkpoint)
            if options.verify:
                check_equal(checkpoint, unproven)
                say("every tensor reads back equal")
        if options.dst.suffix == ".pth":
            say(f"{options.dst} holds tensors alone: threat model, mean and std are lost, which .safetensors keep")
        if not options.dst.suffix:
            describe(options.dst, checkpoint)
        if options.push:
            say(f"uploaded to {push(options.dst, options.push, private=options.private)}")
    else:

        def prove(checkpoint: Checkpoint, written: Path) -> None:
            try:
                from robust_backbones.detection import unproven, verify
            except MissingPackageError as error:
                raise MissingPackageError(f"{error} (the proof needs it), or give --no-verify") from None
            errors = verify.prove(checkpoint, written, image=options.image)
            result["errors"] = [asdict(error) for error in errors]
            shown = [[e.image, e.batch_norm, e.stage, f"{e.largest:.1e}", f"{e.relative:.1e}"] for e in errors]
            say(Table.of(["image", "batch norm", "stage", "max error", "relative"], shown).to_text())
            say(f"features are equal (relative errors < {verify.TOLERANCE:.0e}) against {errors[0].against}")
            differences = unproven.differences(checkpoint, image=options.image)
            result["not_proven"] = [asdict(difference) for difference in differences]
            for difference in differences:
                say(difference)

        report = convert_file(checkpoint, options.dst, prove=prove if options.verify else None)
        report.check()
        say(report)
        result |= {"report": report.to_dict(), "overrides": spec.detectron2_overrides()}
        say(f"Detectron2 needs {as_arguments(result['overrides'])}")
        if options.write_config:
            write_config(options.write_config, options.base_config, options.dst, result["overrides"])
            say(f"configuration written to {options.write_config}")
    if options.json:
        print(json.dumps(result, indent=2))
    say(f"backbone written to {options.dst}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("src", metavar="SRC", help="checkpoint to convert, its URL, or hub:NAME")
    add("dst", type=Path, metavar="DST", help="file to write: .pkl, .pth or .safetensors; or a folder")
    add("--to", choices=("detectron2", "torchvision", "timm"), default="detectron2", help="tensor names of DST")
    add("--push", metavar="USER/NAME", help="upload DST, a folder of --to timm, to the Hugging Face hub")
    add("--private", action="store_true", help="to a private repository")
    add(
        "--source",
        choices=SOURCES,
        metavar="LAYOUT",
        default="",
        help=f"layout of SRC, instead of the one recognised by its keys: {', '.join(SOURCES)}",
    )
    add("--key", help="which of several networks in SRC: its key, such as teacher or state.model")
    add("--prefix", help="which of several networks in SRC: the prefix of its tensor names")
    add("--arch", help="timm's name of the network, if its shapes do not show it, or to confirm a doubtful head")
    floats: dict[str, Any] = {"type": float, "nargs": 3, "metavar": ("C1", "C2", "C3")}
    add("--mean", **floats, help="normalisation of SRC, if it does not say: for pixels in [0, 1]")
    add("--std", **floats)
    add("--channel-order", choices=("RGB", "BGR"))
    add("--stride-in-1x1", choices=("true", "false"), help="whether SRC's bottlenecks stride there")
    add("--require-said", action="store_true", help="refuse to assume what neither SRC nor you say")
    add("--threat-model", metavar="NORM:EPSILON", help="what SRC was trained against, such as L2:3")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prove that nothing changed: by Detectron2's own features or, with torchvision's names, by every tensor",
    )
    add("--image", type=Path, help="run the proof on this photograph too")
    add("--write-config", type=Path, metavar="YAML", help="write a configuration with DST and the keys it needs")
    add("--base-config", type=Path, default=BASE_CONFIG, metavar="YAML", help="its base")
    add("--json", action="store_true", help="print one JSON document on stdout, the rest on stderr")
    options = parser.parse_args(arguments)
    suffixes = {"detectron2": SUFFIXES, "torchvision": SUFFIXES[1:], "timm": ("", ".safetensors")}[options.to]
    if options.dst.suffix not in suffixes or (not options.dst.suffix and options.dst.is_file()):
        endings = " or ".join(filter(None, suffixes))
        wanted = f"be a folder or end in {endings}" if options.to == "timm" else f"end in {endings}"
        raise InputError(f"DST must {wanted}, got {options.dst}")
    if options.push and (options.dst.suffix or not is_repository(options.push)):
        raise InputError("--push USER/NAME uploads a folder: give --to timm and a DST without a suffix")
    if options.private and not options.push:
        raise InputError("--private is of an upload: give --push USER/NAME too")
    if options.image and not (options.verify and options.to == "detectron2"):
        raise InputError(
            "--image is for the proof of features: leave out --no-verify and --to torchvision or timm, or --image"
        )
    if options.write_config and options.to != "detectron2":
        raise InputError(f"--write-config is for Detectron2: leave out --to {options.to}")
    options.base_config = find_file(options.base_config, CONFIG_DIR)
    if not options.base_config.is_file():
        raise InputError(f"no configuration at {options.base_config}: give one of detectron_configs/*/*.yaml")
    if options.base_config != BASE_CONFIG and not options.write_config:
        raise InputError("--base-config is what --write-config is based on: give that too")
    files = [Path(options.src), options.dst if options.dst.suffix else options.dst / WEIGHTS, options.base_config]
    files = [path.resolve() for path in [*files, *filter(None, [options.write_config])]]
    if twice := [path for path in files if files.count(path) > 1]:
        raise InputError(f"{twice[0]} would be overwritten by what is made of it: give another DST or --write-config")
    return options


def read(options: argparse.Namespace) -> Checkpoint:
    statement = Statement(
        mean=options.mean and tuple(options.mean),
        std=options.std and tuple(options.std),
        channel_order=options.channel_order,
        stride_in_1x1=options.stride_in_1x1 and options.stride_in_1x1 == "true",
        threat_model=options.threat_model and ThreatModel.parse(options.threat_model),
        arch=options.arch,
    )
    return read_checkpoint(
        options.src,
        source=options.source,
        key=options.key,
        prefix=options.prefix,
        statement=statement,
        require_said=options.require_said,
    )


def check_equal(checkpoint: Checkpoint, written: Path) -> None:
    back = read_checkpoint(written)
    same_names = back.state_dict.keys() == checkpoint.state_dict.keys()
    if not same_names or not all(torch.equal(back.state_dict[name], t) for name, t in checkpoint.state_dict.items()):
        raise ProofFailedError(f"what was written differs from {checkpoint.source}")


def write_config(path: Path, base: Path, weights: Path, overrides: dict[str, object]) -> None:
    """Write the backbone and the keys it needs, on top of ``base``, in Detectron2's YAML."""
    config: dict[str, Any] = {}
    for key, value in {**overrides, "MODEL.WEIGHTS": str(weights.resolve())}.items():
        *nodes, last = key.split(".")
        node = config
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    relative = os.path.relpath(base.resolve(), path.resolve().parent)
    write_text(path, yaml.safe_dump({"_BASE_": relative, **config}, sort_keys=False))
