"""Use an installed package as a user does: ``python check_install.py`` in its environment, from an empty folder.

It proves that the wheel holds all that the commands need: doctor, a conversion with proof, two iterations of a
detector's training, and the plan of a packaged study. `.ci/run` runs it outside the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

import robust_backbones
from robust_backbones.configs import CONFIG_DIR, STUDY_DIR
from robust_backbones.data.synthetic import ShapesConfig, write_shapes
from robust_backbones.runs.record import RunRecord

CONFIG = CONFIG_DIR / "quick/mask_rcnn_R_18_FPN_shapes_instant.yaml"
SHORT = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", 2, "TEST.EXPECTED_RESULTS", "[]"]


def command(verb: str, *arguments: object) -> str:
    """Run the console command, which must succeed; what it printed."""
    line = [str(Path(sys.executable).with_name("robust-backbones")), verb, *map(str, arguments)]
    print("$ robust-backbones", verb, *arguments, flush=True)
    result = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    print(result.stdout, flush=True)
    assert result.returncode == 0, f"{verb} ended with status {result.returncode}"
    return result.stdout


def write_madrylab(path: Path) -> None:
    """A ResNet-18 as MadryLab's robustness library saves one: model and attacker, each with its normaliser."""
    network = torchvision.models.resnet18(num_classes=4)
    model = {}
    for part, normalizer in (("model", "normalizer"), ("attacker.model", "attacker.normalize")):
        model |= {f"module.{part}.{name}": tensor for name, tensor in network.state_dict().items()}
        model[f"module.{normalizer}.new_mean"] = torch.tensor((0.485, 0.456, 0.406)).reshape(3, 1, 1)
        model[f"module.{normalizer}.new_std"] = torch.tensor((0.229, 0.224, 0.225)).reshape(3, 1, 1)
    torch.save({"model": model, "optimizer": {}, "epoch": 90}, path)


def main() -> None:
    package = Path(robust_backbones.__file__)
    assert package.is_relative_to(sys.prefix), f"{package} is not the installed one"
    assert not any(Path.cwd().iterdir()), "start in an empty folder"
    assert (package.parent / "py.typed").is_file()

    assert "ready" in command("doctor")
    write_madrylab(Path("madrylab.pt"))
    out = command("convert", "madrylab.pt", "backbone.pkl", "--threat-model", "L2:3")
    assert "features are equal" in out

    counts = {"train_images_per_class": 1, "val_images_per_class": 1, "train_scenes": 4, "val_scenes": 2}
    write_shapes(Path("data"), ShapesConfig(scene_size=96, **counts))
    os.environ["DETECTRON2_DATASETS"] = str(Path("data").resolve())
    command("train", "--config-file", CONFIG, *SHORT, "MODEL.WEIGHTS", "backbone.pkl", "OUTPUT_DIR", "run")
    record = RunRecord.read(Path("run/record.json"))
    assert (record.threat_model, record.backbone["arch"]) == ("L2:3", "resnet18")
    command("sweep", "setup", STUDY_DIR / "small.yaml", "--output", "study")
    print("the installed package works")


if __name__ == "__main__":
    main()
