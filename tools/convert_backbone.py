#!/usr/bin/env python
"""Convert a backbone to Detectron2's format, and prove that its features did not change.

Example:
    python tools/convert_backbone.py runs/robust/checkpoint.pt robust.pkl --verify

SRC is a checkpoint of tools/pretrain.py or a torchvision ResNet state dict (.pth); it is read without running any
code that it may hold. DST carries what the backbone is (architecture, mean, std, threat model, sha256 of SRC), which
tools/train_net.py checks against its configuration. Exit status: 0 done, 1 the proof failed, 2 bad input.
"""

import argparse
import sys
from pathlib import Path

from robust_backbones import cli
from robust_backbones.checkpoints import read_checkpoint
from robust_backbones.convert import BackboneMetadata, convert, write_backbone
from robust_backbones.errors import InputError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, metavar="SRC", help="checkpoint to convert")
    parser.add_argument("dst", type=Path, metavar="DST.pkl", help="file to write")
    parser.add_argument("--verify", action="store_true", help="compare res2-res5 with the source's layer1-layer4")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    if options.dst.suffix != ".pkl":
        raise InputError(f"DST must end in .pkl, got {options.dst}")

    if options.verify:  # before anything is written: it says so when Detectron2 is missing
        from robust_backbones.detection.verify import TOLERANCE, feature_errors

    checkpoint = read_checkpoint(options.src)
    metadata = BackboneMetadata.of(checkpoint)
    tensors, report = convert(checkpoint)
    print(f"{options.src}: {checkpoint.layout} layout, {checkpoint.spec.arch}, threat model {metadata.threat_model}")
    print(report)
    if not report.ok:
        raise InputError(f"{options.src} does not hold a whole {checkpoint.spec.arch}; nothing was written")
    # Under another name until it is proven: a failed or interrupted proof leaves no file, and the old one if there was.
    unproven = options.dst.with_name(f".{options.dst.stem}.unproven.pkl")
    try:
        write_backbone(unproven, tensors, metadata)
        overrides = checkpoint.spec.detectron2_overrides()
        print("Detectron2 needs " + ", ".join(f"{key} {value}" for key, value in overrides.items()))
        if options.verify:
            errors = feature_errors(checkpoint, unproven)
            for stage, error in errors.items():
                print(f"{stage}: max relative error {error:.1e}")
            if not max(errors.values()) < TOLERANCE:
                print(f"error: the features differ (not all < {TOLERANCE:.0e}); nothing was written", file=sys.stderr)
                return 1
            print(f"features are equal (all < {TOLERANCE:.0e})")
        unproven.replace(options.dst)
    finally:
        unproven.unlink(missing_ok=True)
    print(f"backbone written to {options.dst}")
    return 0


if __name__ == "__main__":
    cli.run(main)
