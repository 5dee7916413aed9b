"""What CPUs need of their own: faster implementations, up to rounding the same and off by default; batch norms."""

from robust_backbones.cpu.convolutions import fast

__all__ = ["fast"]
