"""Training images in other styles: textures and colours of other images, with unchanged shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_amplitudes(images: Tensor, others: Tensor, shares: Tensor) -> Tensor:
    """Images with the phases of ``images`` and amplitudes between theirs and those of ``others``.

    (1 - share) |F(x)| + share |F(x')| for every frequency and channel, with F the Fourier transform over height and
    width: the amplitude mix of Xu et al. 2021, "A Fourier-based Framework for Domain Generalization", equation 4.
    Phases carry the shapes, amplitudes the style.

    Args:
        images, others: shape (N, C, H, W), float32.
        shares: shape (N,), in [0, 1].

    Returns:
        Shape (N, C, H, W); values may leave [0, 1].
    """
    spectrum = torch.fft.rfft2(images)
    shares = shares[:, None, None, None]
    amplitudes = (1 - shares) * spectrum.abs() + shares * torch.fft.rfft2(others).abs()
    return torch.fft.irfft2(torch.polar(amplitudes, spectrum.angle()), s=images.shape[-2:])


def stylize(images: Tensor, strength: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Each image mixed with amplitudes of another one of the batch, by a share drawn uniformly from 0 to ``strength``.

    Args:
        images: shape (N, 3, H, W), float32 in [0, 1].
        strength: in [0, 1].
        generator: on the images' device; draws partners and shares.

    Returns:
        Shape (N, 3, H, W), clipped to [0, 1], channels last.
    """
    partners = torch.randperm(len(images), generator=generator, device=images.device)
    shares = strength * torch.rand(len(images), generator=generator, device=images.device)
    mixed = mix_amplitudes(images, images[partners], shares).clamp_(0, 1)
    return mixed.contiguous(memory_format=torch.channels_last)
