"""A backbone after detection training, with the classifier that it had before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robust_backbones.checkpoint.convert import metadata_in
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.checkpoint.untrusted import read_file
from robust_backbones.classification.compute import available
from robust_backbones.classification.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord


def with_own_classifier(detector: Path, pretrained: Checkpoint) -> Checkpoint:
    """The backbone of a trained detector (Detectron2's checkpoint) with its former classifier.

    Raises:
        InputError: not such a file; by its own statement it started from another backbone; ``pretrained`` has no
            classifier.
    """
    metadata = metadata_in(read_file(detector))
    if metadata is not None and metadata.source_sha256 != pretrained.source_sha256:
        raise InputError(
            f"{detector} started from {metadata.source} (SHA-256 {metadata.source_sha256[:10]}), another file than "
            f"{pretrained.source} ({pretrained.source_sha256[:10]}): give that checkpoint"
        )
    if not pretrained.spec.num_classes:
        raise InputError(f"{pretrained.source} has no classifier to put back on: give the pre-training checkpoint")
    backbone = read_checkpoint(detector)
    if backbone.spec != replace(pretrained.spec, num_classes=0):
        raise InputError(f"{detector} holds another backbone than {pretrained.source}, or one that is fed otherwise")
    return replace(
        pretrained,
        state_dict={**pretrained.state_dict, **backbone.state_dict},
        layout=backbone.layout,
        source=backbone.source,
        source_sha256=backbone.source_sha256,
    )


def compare_with_detector(
    detector: str | Path,
    pretrained: Checkpoint | str | Path,
    data: str | Path,
    output: str | Path,
    config: RobustnessConfig,
    *,
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> tuple[RunRecord, RunRecord]:
    """``evaluate_robustness`` before and after detection training, in ``output/before`` and ``output/after``.

    Raises:
        InputError: as ``with_own_classifier`` and ``evaluate_robustness``.
    """
    available(device)
    before = pretrained if isinstance(pretrained, Checkpoint) else read_checkpoint(Path(pretrained))
    after = with_own_classifier(Path(detector), before)
    return (
        evaluate_robustness(config, before, data, Path(output) / "before", device=device, workers=workers),
        evaluate_robustness(config, after, data, Path(output) / "after", device=device, workers=workers),
    )
