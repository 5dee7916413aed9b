"""Threat models: the set of perturbations an adversary may choose from, a norm and a radius."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_backbones.errors import InputError, check_choice

NORMS = ("L2", "Linf")


@dataclass(frozen=True)
class ThreatModel:
    """The ball {δ : ‖δ‖ <= epsilon} around an image in [0, 1] (Salman et al. 2020, eq. 2).

    ``epsilon`` is in pixel units of [0, 1]; 0 is standard training, there is no separate flag.
    All methods take and return tensors of shape (C, H, W) or (N, C, H, W) and treat each image on its own.

    Raises:
        InputError: unknown norm; epsilon negative, infinite or not a number, or above 1 for Linf.
    """

    norm: str = "L2"
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise InputError(f"epsilon must be a finite number >= 0, got {self.epsilon:g}")
        if self.norm == "Linf" and self.epsilon > 1:
            raise InputError(
                f"Linf:{self.epsilon:g} is more than the whole range of a pixel, [0, 1]: "
                f"did you mean Linf:{self.epsilon:g}/255?"
            )

    @classmethod
    def parse(cls, text: str | ThreatModel) -> ThreatModel:
        """Read ``"L2:3"``, ``"L2:0.25"`` or ``"Linf:4/255"``; a ThreatModel is returned as it is."""
        if isinstance(text, ThreatModel):
            return text
        norm, separator, epsilon = str(text).partition(":")
        if not separator or not re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?(/\d+)?", epsilon.strip()):
            raise InputError(f"cannot read the threat model {text!r}: write NORM:EPSILON, as in L2:3 or Linf:4/255")
        try:
            numerator, _, denominator = epsilon.partition("/")
            radius = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"cannot read epsilon {epsilon!r} in {text!r}: write a number, as in 3 or 4/255") from None
        return cls(norm.strip(), radius)

    def __str__(self) -> str:
        in_levels = self.epsilon * 255
        if self.norm == "Linf" and self.epsilon and math.isclose(in_levels, float(f"{in_levels:g}"), rel_tol=1e-9):
            return f"Linf:{in_levels:g}/255"
        return f"{self.norm}:{self.epsilon!r}".removesuffix(".0")

    def check_radius(self, shape: Sequence[int]) -> None:
        """Refuse a ball that contains every image of ``shape``, (C, H, W).

        Raises:
            InputError: it does; the message names the likely mistake.
        """
        if self.norm == "L2" and self.epsilon > math.sqrt(math.prod(shape)):
            raise InputError(
                f"the ball {self} holds every image of {' x '.join(map(str, shape))} values in [0, 1]: "
                f"did you mean L2:{self.epsilon:g}/255?"
            )

    def random_start(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A perturbation drawn uniformly from the ball."""
        if self.norm == "Linf":
            return (2 * torch.rand(images.shape, generator=generator, device=images.device) - 1) * self.epsilon
        direction = self.ascent_direction(torch.randn(images.shape, generator=generator, device=images.device))
        # The volume within radius r of a d-ball grows as r^d, hence the d-th root.
        uniform = torch.rand(*images.shape[:-3], 1, 1, 1, generator=generator, device=images.device)
        return direction * self.epsilon * uniform ** (1 / images.shape[-3:].numel())

    def ascent_direction(self, gradient: Tensor) -> Tensor:
        """The unit-norm step that increases a linear function with this gradient fastest; 0 where it is 0.

        Where float16 overflowed, the gradient counts as 0. An l2 step has full length however small the gradient is;
        the library ``robustness`` divides by the norm + 1e-10, which shortens steps when the norm is near 1e-10.
        """
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "Linf":
            return gradient.sign()
        tiny = torch.finfo(gradient.dtype).tiny
        norm = _l2_norm(gradient)
        # Squares of values below 1e-19 vanish in float32, and with them the norm: such a gradient is scaled first.
        scaled = gradient / gradient.abs().amax((-3, -2, -1), keepdim=True).clamp_min(tiny)
        small = scaled / _l2_norm(scaled).clamp_min(tiny)
        return torch.where(norm > 1e-15, gradient / norm.clamp_min(tiny), small)

    def project(self, delta: Tensor) -> Tensor:
        """The point of the ball nearest to ``delta`` in Euclidean distance."""
        if self.norm == "Linf":
            return delta.clamp(-self.epsilon, self.epsilon)
        norm = _l2_norm(delta)
        return torch.where(norm > self.epsilon, delta * (self.epsilon / norm.clamp_min(1e-12)), delta)

    def size(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation, shape () or (N,)."""
        if self.norm == "Linf":
            return delta.abs().amax((-3, -2, -1))
        return _l2_norm(delta)[..., 0, 0, 0]


def _l2_norm(tensor: Tensor) -> Tensor:
    """Shape (..., C, H, W) -> (..., 1, 1, 1)."""
    return torch.linalg.vector_norm(tensor, dim=(-3, -2, -1), keepdim=True)
