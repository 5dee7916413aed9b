"""Convolutions of few pixels, as matrix products."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_PIXELS = 16


def multiply_few_pixels(net: nn.Module) -> None:
    """Make ``Convolution``s of those of ``net``, in place: the same parameters under the same names."""
    for module in net.modules():
        if Convolution.can_be(module):
            module.__class__ = Convolution


class Convolution(nn.Conv2d):
    """A convolution that is a matrix product over the windows of the whole batch where images have few pixels.

    On CPUs convolutions go image by image: those of res5 at 64 px, with outputs of 2 x 2 pixels, take three times as
    long, and their gradients with it. On other devices, and in other precisions than float32, it is a convolution as
    any other.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32:
            return super().forward(inputs)
        height, width = (
            (size + 2 * padding - window) // stride + 1
            for size, padding, window, stride in zip(
                inputs.shape[2:], cast(tuple[int, int], self.padding), self.kernel_size, self.stride, strict=True
            )
        )
        if height * width >= _FEW_PIXELS:
            return super().forward(inputs)
        (down, right), (above, beside) = self.stride, cast(tuple[int, int], self.padding)
        padded = inputs.permute(0, 2, 3, 1)
        if above or beside:
            padded = F.pad(padded, (0, 0, beside, beside, above, above))
        windows = [
            padded[:, top : top + down * (height - 1) + 1 : down, left : left + right * (width - 1) + 1 : right]
            for top in range(self.kernel_size[0])
            for left in range(self.kernel_size[1])
        ]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # no copy: channels come last
        columns = windows[0] if len(windows) == 1 else torch.cat(windows, dim=3)
        return F.linear(columns, weight, self.bias).permute(0, 3, 1, 2)

    @staticmethod
    def can_be(module: nn.Module) -> bool:
        return (
            type(module) is nn.Conv2d
            and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
            and isinstance(module.padding, tuple)
        )
