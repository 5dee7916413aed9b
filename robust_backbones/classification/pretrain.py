"""Robust pre-training of a classifier, from scratch or from the weights of another network."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import Execution, TrainingConfig
from robust_backbones.classification.robustness import check_classes
from robust_backbones.classification.train import TrainingTask, train
from robust_backbones.data.datasets import check_several, open_dataset, warn_of_shared
from robust_backbones.errors import InputError
from robust_backbones.models import (
    BackboneSpec,
    NormalizedModel,
    backbone_with,
    build_backbone,
    fed_as,
    reference_shapes,
    usual_spec,
)
from robust_backbones.runs.distributed import is_first_process
from robust_backbones.runs.identity import FINGERPRINT
from robust_backbones.runs.record import RunRecord


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """The identity of a run: same config, same data, same result. The defaults are the paper's ImageNet recipe."""

    arch: str = "resnet50"
    """A ResNet or another network of the paper, or any classifier of timm, such as convnext_tiny."""
    stem: str = "imagenet"
    """imagenet, or cifar: a ResNet for 32 px images, without stride and pooling before the first block."""
    stylize: float = 0.0
    """Mix another image's amplitude spectrum into each training image, by a share drawn from 0 to this, up to 1:
    textures and colours vary, shapes stay (Xu et al. 2021, "A Fourier-based Framework for Domain Generalization").
    0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stylize <= 1:
            raise InputError(f"stylize is a largest share of other amplitudes, in [0, 1], got {self.stylize:g}")
        usual_spec(self.arch, stem=self.stem)  # refuses what it does not know


def pretrain(
    config: PretrainConfig,
    data: str | Path,
    output: str | Path,
    execution: Execution = Execution(),
    *,
    start_from: str | Path | None = None,
) -> RunRecord:
    """Train on ``data/train``, evaluate on ``data/val``; see ``train.train`` for what it writes, returns and raises.

    Args:
        data: folder with train/ and val/ of the same classes, each readable by ``open_dataset``.
        output: folder of the run, new or to resume.
        start_from: a checkpoint of the same architecture, whose preprocessing is used too; its classifier is kept if
            its classes are the same, by number and, where it names them, by name. Default: random weights.
    """
    data, start = Path(data), None if start_from is None else read_start(start_from, config)
    spec = start.spec if start else usual_spec(config.arch, stem=config.stem)
    asked = {name: getattr(config, name) for name in ("image_size", "val_resize", "interpolation")}
    spec = replace(spec, **{name: value for name, value in asked.items() if value})  # as it is to be evaluated
    config = fed_as(config, spec)
    cache, transform = config.image_cache(execution.cache), config.val_transform()
    parts = [open_dataset(data / part, transform, seed=config.seed, cache=cache) for part in ("train", "val")]
    if parts[0].classes != parts[1].classes:
        raise InputError(f"{data / 'train'} and {data / 'val'} hold different classes: give both the same")
    check_several(parts[0].classes, data / "train")
    warn_of_shared(*parts)
    classes = parts[0].classes
    spec = replace(spec, num_classes=len(classes), val_resize=config.val_resize)
    keeps = start is not None and _knows(start, classes, data / "train")
    origin = {"start_sha256": start.source_sha256} if start else {}
    task = TrainingTask(
        name="pretrain",
        dataset=data.name,
        train=parts[0],
        val=parts[1],
        spec=spec,
        build=lambda: NormalizedModel(_network(spec, start, keeps, config.seed), spec),
        parameter_groups=lambda model: [{"params": list(model.parameters())}],
        identity={
            "data": data.name,
            FINGERPRINT: {
                "train": parts[0].fingerprint(),
                "val": parts[1].fingerprint(),
                "classes": hashlib.sha256(os.fsencode("\n".join(classes))).hexdigest()[:4],
            },
            **origin,
        },
        backbone=spec.to_dict() | origin,
        threat_model=str(config.threat_model),
        stylize=config.stylize,
    )
    return train(config, task, output, execution)


def read_start(path: str | Path, config: PretrainConfig) -> Checkpoint:
    """The checkpoint that a run starts from, as a network for RGB images.

    Raises:
        InputError: it cannot be read, or has another architecture.
    """
    start = read_checkpoint(Path(path)).in_rgb()
    if (start.spec.arch, start.spec.stem) != (config.arch, config.stem):
        stem = f" --stem {start.spec.stem}" if start.spec.stem != config.stem else ""
        raise InputError(f"{path} holds a {start.spec.arch}, not a {config.arch}: give --arch {start.spec.arch}{stem}")
    return start


def _knows(start: Checkpoint, classes: Sequence[str], folder: Path) -> bool:
    """Whether the classifier of ``start`` is of these classes; says so where only their number is the same."""
    if start.spec.num_classes != len(classes):
        return False
    try:
        check_classes(classes, folder, start)
    except InputError as error:
        if is_first_process():
            print(f"warning: the run starts with a new classifier, because {error}", flush=True)
        return False
    return True


def _network(spec: BackboneSpec, start: Checkpoint | None, keeps_classifier: bool, seed: int) -> nn.Module:
    """Random weights, or those that the run starts from, with a new classifier unless that is to be kept."""
    net = build_backbone(spec, seed=seed)
    if start is None:
        return net
    weights = {**start.state_dict}
    if not keeps_classifier:
        classifier = reference_shapes(spec.arch, spec.stem, spec.image_size)[1]
        weights |= {name: tensor for name, tensor in net.state_dict().items() if name.startswith(f"{classifier}.")}
    return backbone_with(spec, weights)
