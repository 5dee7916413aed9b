"""Visualising representations: images that maximise a unit, images that match a representation, and input gradients.

The method of Engstrom et al. (2019, "Adversarial robustness as a prior for learned representations"), which Figure 1 of
Salman et al. (2020) shows: gradient ascent over pixels in steps of fixed length, without any regularisation, so that
the result shows the network's own prior. No function changes the network.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, Losses, Strongest, ascend, frozen_eval
from robust_backbones.data.datasets import mix
from robust_backbones.errors import InputError, check_positive
from robust_backbones.models import NormalizedModel
from robust_backbones.threat_models import ThreatModel

LOGITS = "logits"
"""The layer that is the network's output."""
PENULTIMATE = "penultimate"
"""The layer that is the classifier's input; the output of a network without a classifier."""
Models = Mapping[str, NormalizedModel]
Row = dict[str, Any]
Progress = Callable[[int], object]
"""Called at every step with the number of images."""

_SSIM_WINDOW = 11


@dataclass(frozen=True)
class AscentConfig:
    """Effort and bounds of the ascent. Engstrom et al.'s public code takes 200 steps to maximise, 10,000 to invert."""

    steps: int = 200
    step_size: float = 0.005
    """Root mean square of a step's change over all pixels, in [0, 1] units: the same at any resolution.
    A step of l2 length 1 at 224 px, as in the public code, is 0.0026."""
    ball: ThreatModel | None = None
    """Stay in this ball around the start, as NORM:EPSILON; without it every image in [0, 1] can be reached."""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "step_size")
        if self.ball is not None and self.ball.epsilon == 0:
            raise InputError("a ball of radius 0 holds the start alone: leave it out, or choose a greater one")


class Synthesis(NamedTuple):
    """Images found by gradient ascent, each the best point of its run, and what was optimised, before and after."""

    images: Tensor
    """Shape (N, 3, H, W), in [0, 1]."""
    values: Tensor
    """Shape (N,)."""
    start_values: Tensor
    """Values of the starts, shape (N,)."""


def noise(count: int, size: int, *, seed: int) -> Tensor:
    """Starts: grey with Gaussian noise of standard deviation 1/20, clipped to [0, 1], as in the public code.

    Shape (count, 3, size, size), float32; an image depends only on the seed and its own index.
    """
    generators = (torch.Generator().manual_seed(mix(seed, 0, index)) for index in range(count))
    images = [0.5 + torch.randn(3, size, size, generator=generator) / 20 for generator in generators]
    return torch.stack(images).clamp(0, 1)


def activations(model: NormalizedModel, images: Tensor, layer: str = PENULTIMATE) -> Tensor:
    """A layer's output, differentiable; nothing after the layer is computed.

    Args:
        images: shape (N, 3, H, W), in [0, 1].
        layer: PENULTIMATE, LOGITS, or a module of ``model.backbone`` such as ``layer3`` or ``layer4.1.conv2``; of a
            module that runs several times, as a ResNet's ReLUs do, the first.

    Returns:
        Shape (N, D), or (N, C, H', W').

    Raises:
        InputError: the network has no such layer.
    """

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        raise _Reached(inputs[0] if output is None else output)

    classifier = _classifier(model)
    if layer == LOGITS:
        _check_classifier(model)
    if layer == LOGITS or (layer == PENULTIMATE and classifier is None):
        return model(images)
    if layer == PENULTIMATE and classifier is not None:
        handle = classifier.register_forward_pre_hook(stop)
    else:
        handle = _module(model.backbone, layer).register_forward_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise InputError(f"the network has a module {layer}, but no image goes through it: choose another layer")


class _Reached(Exception):  # noqa: N818  # no error: ends the forward pass at the layer
    pass


def activation_losses(model: NormalizedModel, units: Tensor, layer: str = LOGITS) -> Losses:
    """The objective of ``maximize_activation``; it refuses a layer or unit that does not exist."""

    def losses(points: Tensor) -> Tensor:
        output = activations(model, points, layer)
        values = output.flatten(2).mean(2) if output.ndim > 2 else output
        if not 0 <= int(units.min()) <= int(units.max()) < values.shape[1]:
            raise InputError(f"{layer} has the units 0 to {values.shape[1] - 1}, not {units.tolist()}: choose others")
        return values.gather(1, units[:, None]).squeeze(1)

    return losses


def inversion_losses(model: NormalizedModel, targets: Tensor, layer: str = PENULTIMATE) -> Losses:
    """The objective of ``invert`` with its sign changed: -‖R(x) - R(target)‖ / ‖R(target)‖."""
    with torch.no_grad():
        wanted = activations(model, targets, layer).flatten(1)
    lengths = torch.linalg.vector_norm(wanted, dim=1).clamp_min(1e-12)

    def losses(points: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(activations(model, points, layer).flatten(1) - wanted, dim=1) / lengths

    return losses


def maximize_activation(
    model: NormalizedModel,
    starts: Tensor,
    units: Tensor,
    *,
    layer: str = LOGITS,
    ascent: AscentConfig = AscentConfig(),
    progress: Progress | None = None,
) -> Synthesis:
    """Images that maximise a class logit, or a unit of any layer: the source's direct feature visualisation.

    The gradient is the objective's own; that of the public code also passes the last ReLU where it is 0.

    Args:
        starts: shape (N, 3, H, W), in [0, 1], such as ``noise``.
        units: shape (N,), which unit each image is to maximise; of a feature map, channels, by their mean.
        layer: as for ``activations``; refused if the network has no such layer or unit.

    Returns:
        The images and the units' activations.
    """
    with frozen_eval(model):
        best = _climb(activation_losses(model, units, layer), starts, ascent, progress)
    return Synthesis(best.points, best.losses, best.first_losses)


def invert(
    model: NormalizedModel,
    targets: Tensor,
    starts: Tensor,
    *,
    layer: str = PENULTIMATE,
    ascent: AscentConfig = AscentConfig(),
    progress: Progress | None = None,
) -> Synthesis:
    """Images with the representation of other images, each independently: the source's representation inversion.

    Args:
        targets: images to be matched, shape (N, 3, H, W), in [0, 1].
        starts: of the same shape: ``noise``, or other images.
        layer: as for ``activations``.

    Returns:
        The images and their normalised distances ‖R(x) - R(target)‖ / ‖R(target)‖, never above those of the starts.
    """
    with frozen_eval(model):
        best = _climb(inversion_losses(model, targets, layer), starts, ascent, progress)
    return Synthesis(best.points, -best.losses, -best.first_losses)


def _climb(losses: Losses, starts: Tensor, ascent: AscentConfig, progress: Progress | None) -> Strongest:
    pixels = starts[0].numel()
    ball = ascent.ball or ThreatModel("L2", math.sqrt(pixels))  # the diameter of [0, 1]^d: it never binds
    length = ascent.step_size * (math.sqrt(pixels) if ball.norm == "L2" else 1)
    best = Strongest()

    def visit(points: Tensor, values: Tensor) -> None:
        if progress is not None and best.shown:  # the start is no step
            progress(len(points))
        best.show(points, values)

    ascend(losses, starts, ball, AttackConfig(ascent.steps, length / ball.epsilon), start=starts, visit=visit)
    return best


def saliency(model: NormalizedModel, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the cross-entropy with respect to the pixels (Tsipras et al. 2019, Figure 2).

    Args:
        images: shape (N, 3, H, W), in [0, 1]; so is the gradient's.
        labels: shape (N,), class indices.

    Raises:
        InputError: the network has no classifier.
    """
    _check_classifier(model)
    return _gradient(model, images, lambda logits: F.cross_entropy(logits, labels, reduction="sum"))


def saliency_alignment(model: NormalizedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """The alignment of Etmann et al. (2019, arXiv 1905.04172): alpha(x) = |<x, g>| / ‖g‖.

    g is the gradient of the winning logit with respect to the pixels and x the image, both in [0, 1] pixel units. For
    two classes separated by the sign of <w, x>, alpha is the distance to the decision boundary; robustly trained
    networks tend to have a larger one. 0 where the gradient is 0.

    Args:
        images: shape (N, 3, H, W), in [0, 1].

    Returns:
        alpha and cosine, each of shape (N,). alpha is in units of ‖x‖; cosine, |<x, g>| / (‖x‖ ‖g‖) in [0, 1], is the
        same without the images' brightness and size.

    Raises:
        InputError: the network has no classifier.
    """
    _check_classifier(model)
    gradient = _gradient(model, images, lambda logits: logits.max(1).values.sum()).flatten(1)
    pixels = images.flatten(1)
    tiny = torch.finfo(images.dtype).tiny
    unit = gradient / torch.linalg.vector_norm(gradient, dim=1, keepdim=True).clamp_min(tiny)
    alpha = (pixels * unit).sum(1).abs()
    return alpha, alpha / torch.linalg.vector_norm(pixels, dim=1).clamp_min(tiny)


def _gradient(model: NormalizedModel, images: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    with frozen_eval(model), torch.enable_grad():
        points = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(total(model(points)), points)
    return gradient


def pixel_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the pixels of each pair of images, over positions and channels; 0 if one is constant.

    Shape (N, C, H, W) -> (N,), in [-1, 1], float64.
    """
    # In float64, in which the rounding of a constant image's mean is nothing.
    a, b = (images.flatten(1).double() for images in (a, b))
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004), mean over colours, by scikit-image.

    The settings are the paper's: a Gaussian window of 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03.

    Args:
        a, b: shape (N, C, H, W), in [0, 1].

    Returns:
        Shape (N,), at most 1, float64 on the CPU.

    Raises:
        InputError: scikit-image is not installed; images smaller than the window.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise InputError(f"SSIM cannot be measured ({error}): pip install scikit-image") from None
    if min(a.shape[-2:]) < _SSIM_WINDOW:
        raise InputError(f"SSIM needs images of {_SSIM_WINDOW} pixels: give a greater --image-size")
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True)
    return torch.tensor([structural_similarity(x, y, channel_axis=0, **wang) for x, y in pairs], dtype=torch.float64)


def gradients_as_images(gradients: Tensor) -> Tensor:
    """Gradients (N, 3, H, W) to look at: three standard deviations around 0 fill [0, 1] (Tsipras et al. 2019)."""
    deviation = gradients.flatten(1).std(1).clamp_min(torch.finfo(gradients.dtype).tiny)[:, None, None, None]
    return (gradients / (6 * deviation) + 0.5).clamp(0, 1)


def _module(backbone: nn.Module, name: str) -> nn.Module:
    modules = {place: module for place, module in backbone.named_modules() if place}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, 3) or [child for child, _ in backbone.named_children()]
        raise InputError(f"no layer {name!r}: choose {PENULTIMATE}, {LOGITS}, or a module such as {', '.join(near)}")
    return modules[name]


def _classifier(model: NormalizedModel) -> nn.Linear | None:
    """The last linear layer; None for a network without a classifier, such as a detector's backbone."""
    linear = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and model.spec.num_classes else None


def _check_classifier(model: NormalizedModel) -> None:
    if _classifier(model) is None:
        raise InputError(
            "the network has no classifier, as a detector's backbone has none, and so no logits: "
            "give the checkpoint that it was trained from, or another --layer than logits where the command has it"
        )


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
    find = partial(maximize_activation, layer=layer, ascent=ascent, progress=progress)
    starts, rows, grid = noise(len(units), image_size, seed=seed), list[Row](), dict[str, Tensor]()
    for name, model in models.items():
        grid[name], values, before = _in_batches(find, model, batch_size, starts, torch.tensor(units))
        rows += _rows([f"unit {unit}" for unit in units], name, activation=values.tolist(), before=before.tolist())
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
    """Images with the representations of photographs, found from ``starts``, and their similarity to the photographs.

    ``ssim``, ``pixel_correlation`` and ``distance``, ‖R(x) - R(target)‖ / ‖R(target)‖; starts have no distance, because
    it differs for every backbone.
    """
    find = partial(invert, layer=layer, ascent=ascent, progress=progress)
    targets, rows = photographs.pixels, list[Row]()
    grid, distances = {"target": targets, "start": starts}, {"start": [None] * len(targets)}
    for name, model in models.items():
        grid[name], values, _ = _in_batches(find, model, batch_size, targets, starts)
        distances[name] = values.tolist()
    for name, distance in distances.items():
        likeness, correlation = (measure(grid[name], targets).tolist() for measure in (ssim, pixel_correlation))
        rows += _rows(photographs.names, name, ssim=likeness, pixel_correlation=correlation, distance=distance)
    return SideBySide(rows, grid)


def compare_saliency(
    models: Models, photographs: Photographs, *, batch_size: int = 25, progress: Progress | None = None
) -> SideBySide:
    """Input gradients of the class that each backbone predicts, their ``alignment`` and ``cosine`` with the image."""

    def see(model: NormalizedModel, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            predicted = model(pixels).argmax(1)
        maps = gradients_as_images(saliency(model, pixels, predicted))
        if progress:
            progress(len(pixels))
        return maps, *saliency_alignment(model, pixels)

    rows, grid = list[Row](), {"image": photographs.pixels}
    for name, model in models.items():
        grid[name], alpha, cosine = _in_batches(see, model, batch_size, photographs.pixels)
        rows += _rows(photographs.names, name, alignment=alpha.tolist(), cosine=cosine.tolist())
    return SideBySide(rows, grid)


def _in_batches(
    function: Callable[..., tuple[Tensor, ...]], model: NormalizedModel, size: int, *tensors: Tensor
) -> list[Tensor]:
    """What ``function`` returns for the model and the tensors, batch by batch on the model's device, on the CPU."""
    device = next(model.parameters()).device
    parts = [
        function(model, *batch) for batch in zip(*(tensor.to(device).split(size) for tensor in tensors), strict=True)
    ]
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]


def _rows(images: Sequence[str], backbone: str, **columns: Sequence[float | None]) -> list[Row]:
    values = zip(*columns.values(), strict=True)
    return [
        {"image": image, "backbone": backbone, **dict(zip(columns, row, strict=True))}
        for image, row in zip(images, values, strict=True)
    ]
