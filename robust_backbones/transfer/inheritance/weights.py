"""Networks made from the weights of others: interpolation and soups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""A network's tensors by name."""


def interpolate(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """WiSE-FT: (1 - alpha) start + alpha end (Wortsman et al. 2022, arXiv 2109.01903, equation 1).

    Of every weight and every batch-norm statistic; at alpha 0 and 1 these are ``start`` and ``end`` bit for bit.
    Batch norms' counters are the end's.
    """
    return {
        name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def mean(members: Sequence[Weights]) -> dict[str, Tensor]:
    """The uniform soup: the mean of every tensor over the members (Wortsman et al. 2022, arXiv 2203.05482, eq. 1).

    It does not depend on their order (sums are in float64). Batch norms' counters are the last member's.
    """
    return {
        name: torch.stack([member[name].double() for member in members]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in members[-1].items()
    }


def greedy_soup(
    members: Mapping[str, Weights], score: Callable[[Weights], float]
) -> tuple[list[str], dict[str, Tensor]]:
    """Add members from the best on, each kept if the soup is no worse with it (arXiv 2203.05482, recipe 1).

    Args:
        members: by name; of equal ones the first comes first.
        score: accuracy on held-out images.

    Returns:
        The names of those in the soup, and its weights: its score is never below that of the best member.
    """
    scores = {name: score(member) for name, member in members.items()}
    ranked = sorted(members, key=lambda name: -scores[name])
    chosen, soup, best = [ranked[0]], dict(members[ranked[0]]), scores[ranked[0]]
    for name in ranked[1:]:
        with_it = mean([members[other] for other in [*chosen, name]])
        if (found := score(with_it)) >= best:
            chosen, soup, best = [*chosen, name], with_it, found
    return chosen, soup
