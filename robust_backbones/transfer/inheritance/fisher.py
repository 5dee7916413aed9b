"""The diagonal of the Fisher information matrix, by its definition."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Batch
from robust_backbones.models import NormalizedModel


def diagonal_fisher(
    model: NormalizedModel,
    batches: Iterable[Batch],
    compute: Compute,
    *,
    labels: int = 0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """F_i = E_x E_{y ~ p(y | x)} (∂ log p(y | x) / ∂θ_i)², the network in eval mode and in float32.

    The labels are the network's own predictions, not those of the data, and gradients are squared image by image: with
    the data's labels, or with gradients of whole batches, it would be another matrix (Kunstner et al. 2019, arXiv
    1905.12558).

    Args:
        batches: uint8 images whose mean is taken; their labels are not looked at.
        labels: 0 takes the expectation over y exactly, a backward pass for each class; otherwise the mean over so many
            labels drawn from p(y | x), whose expectation is the same.
        generator: draws them; on the CPU.

    Returns:
        For every parameter of ``model.backbone`` by name, a tensor of its shape.
    """
    model = copy.deepcopy(model).eval().requires_grad_()
    parameters = dict(model.backbone.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for pixels, _ in batches:
        for image in compute.to_unit_range(pixels).split(1):
            squares = _of_image(model, image, list(parameters.values()), labels, generator)
            for total, square in zip(sums.values(), squares, strict=True):
                total += square
            count += 1
    return {name: total / count for name, total in sums.items()}


def _of_image(
    model: NormalizedModel, image: Tensor, parameters: list[Tensor], labels: int, generator: torch.Generator | None
) -> list[Tensor]:
    """E_y (∂ log p(y | x) / ∂θ)² of one image, (1, 3, H, W), for each parameter."""
    log_p = model(image).log_softmax(1)[0]
    p = log_p.detach().exp()
    if labels:
        ys = torch.multinomial(p.cpu(), labels, replacement=True, generator=generator).to(p.device)
        shares = torch.full_like(p[ys], 1 / labels)
    else:
        ys, shares = torch.arange(len(p), device=p.device), p
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for y, share in zip(ys.tolist(), shares.tolist(), strict=True):
        gradients = torch.autograd.grad(log_p[y], parameters, retain_graph=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total.addcmul_(gradient, gradient, value=share)
    return totals
