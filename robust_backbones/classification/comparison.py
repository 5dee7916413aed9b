"""Backbones side by side: what they see, as rows of numbers (one an image and backbone) and as a grid of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_backbones.classification.visualization import (
    LOGITS,
    AscentConfig,
    Synthesis,
    gradients_as_images,
    invert,
    maximize_activation,
    noise,
    pixel_correlation,
    saliency,
    saliency_alignment,
    ssim,
)
from robust_backbones.models import NormalizedModel

Models = Mapping[str, NormalizedModel]
Row = dict[str, Any]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Photographs:
    names: Sequence[str]
    pixels: Tensor
    """Shape (N, 3, H, W), in [0, 1]."""


@dataclass(frozen=True)
class SideBySide:
    rows: list[Row]
    """``image``, ``backbone`` and measures, in their own units."""
    grid: dict[str, Tensor]
    """Rows of the picture: name -> images of shape (N, 3, H, W), in [0, 1]."""
    titles: Sequence[str] = ()
    """Of the picture's columns; they may have none."""


def compare_units(
    models: Models,
    units: Sequence[int],
    image_size: int,
    *,
    layer: str,
    ascent: AscentConfig,
    batch_size: int = 25,
    seed: int = 0,
    progress: Progress | None = None,
) -> SideBySide:
    """Images of ``image_size`` pixels that maximise units of a layer, from noise; ``activation`` after and before."""
    starts, rows, grid = noise(len(units), image_size, seed=seed), list[Row](), dict[str, Tensor]()
    for name, model in models.items():
        found = _joined(
            maximize_activation(model, *batch, layer=layer, ascent=ascent, progress=progress)
            for batch in _batches(model, batch_size, starts, torch.tensor(units))
        )
        rows += [
            {"image": f"unit {unit}", "backbone": name, "activation": value, "before": before}
            for unit, value, before in zip(units, found.values.tolist(), found.start_values.tolist(), strict=True)
        ]
        grid[name] = found.images
    return SideBySide(rows, grid, [f"{'class' if layer == LOGITS else 'unit'} {unit}" for unit in units])


def compare_inversions(
    models: Models,
    photographs: Photographs,
    starts: Tensor,
    *,
    layer: str,
    ascent: AscentConfig,
    batch_size: int = 25,
    progress: Progress | None = None,
) -> SideBySide:
    """Images with the representations of photographs, found from ``starts``: how like the photographs they are.

    ``ssim``, ``pixel_correlation`` and ``distance``, ‖R(x) - R(target)‖ / ‖R(target)‖; starts have no distance, as it
    is another for every backbone.
    """
    targets = photographs.pixels
    grid, distances = {"target": targets, "start": starts}, {"start": [None] * len(targets)}
    for name, model in models.items():
        found = _joined(
            invert(model, *batch, layer=layer, ascent=ascent, progress=progress)
            for batch in _batches(model, batch_size, targets, starts)
        )
        grid[name], distances[name] = found.images, found.values.tolist()
    rows = [
        {"backbone": name, "image": image, "ssim": likeness, "pixel_correlation": correlation, "distance": distance}
        for name in distances
        for image, likeness, correlation, distance in zip(
            photographs.names,
            ssim(grid[name], targets).tolist(),
            pixel_correlation(grid[name], targets).tolist(),
            distances[name],
            strict=True,
        )
    ]
    return SideBySide(rows, grid)


def compare_saliency(
    models: Models, photographs: Photographs, *, batch_size: int = 25, progress: Progress | None = None
) -> SideBySide:
    """Input gradients of the class that each backbone predicts, their ``alignment`` and ``cosine`` with the image."""
    rows, grid = list[Row](), {"image": photographs.pixels}
    for name, model in models.items():
        maps, lengths, cosines = list[Tensor](), list[float](), list[float]()
        for (pixels,) in _batches(model, batch_size, photographs.pixels):
            with torch.no_grad():
                predicted = model(pixels).argmax(1)
            maps.append(gradients_as_images(saliency(model, pixels, predicted)).cpu())
            alignment = saliency_alignment(model, pixels)
            lengths += alignment.alpha.tolist()
            cosines += alignment.cosine.tolist()
            if progress:
                progress(len(pixels))
        grid[name] = torch.cat(maps)
        rows += [
            {"backbone": name, "image": image, "alignment": length, "cosine": cosine}
            for image, length, cosine in zip(photographs.names, lengths, cosines, strict=True)
        ]
    return SideBySide(rows, grid)


def _batches(model: NormalizedModel, size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in batches, on the model's device."""
    device = next(model.parameters()).device
    return zip(*(tensor.to(device).split(size) for tensor in tensors), strict=True)


def _joined(parts: Iterator[Synthesis]) -> Synthesis:
    """All batches as one, on the CPU."""
    columns = zip(*((part.images, part.values, part.start_values) for part in parts), strict=True)
    return Synthesis(*(torch.cat(column).cpu() for column in columns))
