"""The network whose examples and features are compared: a ResNet that was trained for minutes, not a random one.

On random weights rounding alone turns an attack's steps; a trained network's gradients stand clear of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.turns import Arrays
from benchmarks.work import Check
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import Execution
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.synthetic import ShapesConfig, write_shapes
from robust_backbones.data.transforms import val_transform
from robust_backbones.models import NormalizedModel, build_backbone
from robust_backbones.runs.files import atomic_path
from robust_backbones.threat_models import ThreatModel

SIZE = 64
MEAN_LOSS_LIMIT = 1e-3
"""How far rounding may bring mean losses apart, see ``equal_losses``."""
SHAPES = ShapesConfig(train_images_per_class=400, val_images_per_class=100, train_scenes=1, val_scenes=1)
TRAINING = PretrainConfig(
    threat_model=ThreatModel("L2", 0.25),
    attack=AttackConfig(steps=1, relative_step_size=1.0),
    eval_attack=AttackConfig(steps=3),
    eval_images=100,
    epochs=2,
    eval_period=2,
    batch_size=32,
    lr=0.02,
    schedule="one_cycle",
    image_size=SIZE,
    val_resize=SIZE,
    min_crop_scale=0.5,
)


def trained_network(folder: Path, arch: str, device: str) -> Path:
    """Checkpoint of ``arch``, trained on synthetic shapes of 64 px, made at the first call."""
    write_shapes(folder / "shapes", SHAPES)
    run = folder / "networks" / arch
    if not (run / "record.json").exists():
        config = replace(TRAINING, arch=arch)
        pretrain(config, folder / "shapes/shapes_classification", run, Execution(device=device, workers=0))
    return run / "checkpoint.pt"


def held_out_images(folder: Path, count: int, size: int, *, contrast: float = 1.0) -> Path:
    """File of ``images`` uint8 (count, 3, size, size) and ``labels``: shapes that no network was trained on.

    ``contrast`` below 1 leaves room between every pixel and black and white.
    """
    path = folder / f"images_{count}_{size}_{contrast:g}.npz"
    if not path.exists():
        write_shapes(folder / "shapes", SHAPES)
        part = folder / "shapes/shapes_classification/val"
        dataset = open_dataset(part, val_transform(size, resize=size)).sample(count, seed=0)
        images, labels = zip(*(dataset[position] for position in range(count)), strict=True)
        pixels = (127.5 + contrast * (torch.stack(images).float() - 127.5)).round().to(torch.uint8)
        with atomic_path(path) as temporary:
            np.savez(temporary, images=pixels.numpy(), labels=np.array(labels))
    return path


def load_network(checkpoint: str, device: str) -> NormalizedModel:
    """In eval mode, default memory format."""
    read = read_checkpoint(Path(checkpoint))
    model = NormalizedModel(build_backbone(read.spec), read.spec)
    model.backbone.load_state_dict(read.state_dict)
    return model.eval().to(device)


def load_images(path: str, device: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], shape (N, 3, H, W), and labels."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return images.to(device).float() / 255, labels.to(device)


@torch.no_grad()
def judged(model: nn.Module, adversarial: NDArray[np.float32], labels: Tensor) -> tuple[NDArray[np.float32], float]:
    """(Losses in nats (N,), accuracy 0-100) of the network in float32 on these images."""
    logits = torch.cat([model(part.to(labels.device)) for part in torch.from_numpy(adversarial).split(50)])
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.cpu().numpy(), 100 * float((logits.argmax(1) == labels).float().mean())


def outcome(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Arrays:
    """What the ways' attacks are compared by: losses and accuracy under the reference network, the examples' size."""
    losses, robust = judged(model, adversarial.detach().float().cpu().numpy(), labels)
    delta = (adversarial.detach().float() - images).flatten(1)
    return {"losses": losses, "accuracy": np.array(robust), "largest": delta.abs().amax().cpu().numpy()}


def equal_losses(what: str, found: Arrays, reference: Arrays) -> list[Check]:
    """Two attacks in float32 are the same: losses agree to 1e-4 in the mean of 99 % of the images, to 1e-3 of all.

    At a kink of the network rounding alone can lead an image elsewhere, and the mean over all shows that one: 2.0e-4 in
    docs/benchmarks/attack.json, l-inf. So a hundredth of the images, or one, is left out of the first.
    """
    gaps = np.abs(found["losses"] - reference["losses"])
    kept = np.sort(gaps)[: -max(1, len(gaps) // 100)]
    return [
        Check(f"{what}, mean gap of {len(kept)} of {len(gaps)} images", float(kept.mean()), 1e-4),
        Check(f"{what}, mean gap of all", float(gaps.mean()), MEAN_LOSS_LIMIT),
    ]
