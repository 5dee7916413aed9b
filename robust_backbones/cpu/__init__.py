"""Faster CPU implementations with the same results, up to rounding; all are off by default."""

from robust_backbones.cpu.convolutions import fast

__all__ = ["fast"]
