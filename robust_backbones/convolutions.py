"""Convolutions that CPUs are slow at, as other operations of the same result."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_PIXELS = 16
_FEW_CHANNELS = 4


def use_fast_convolutions(net: nn.Module) -> None:
    """Make ``Convolution``s of those of ``net``, in place: the same parameters under the same names."""
    for module in net.modules():
        if Convolution.can_be(module):
            module.__class__ = Convolution


class Convolution(nn.Conv2d):
    """A convolution that on CPUs, in float32 and bfloat16, takes another way where its own is slow.

    Where the output has few pixels, it is a matrix product over the windows of the whole batch: convolutions go image
    by image, and those of res5 at 64 px, with outputs of 2 x 2 pixels, take three times as long.

    Where inputs of few channels have a gradient and the stride is not 1, as in a ResNet's stem under attack, it is a
    convolution of stride 1 over blocks of stride x stride pixels: the gradient of a strided one is slow.

    Anywhere else it is a convolution as any other.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu" or inputs.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(inputs)
        height, width = (
            (size + 2 * padding - window) // stride + 1
            for size, padding, window, stride in zip(
                inputs.shape[2:], cast(tuple[int, int], self.padding), self.kernel_size, self.stride, strict=True
            )
        )
        if height * width < _FEW_PIXELS:
            return self._over_windows(inputs, height, width)
        square = self.stride[0] == self.stride[1] > 1
        if square and self.in_channels <= _FEW_CHANNELS and inputs.requires_grad and torch.is_grad_enabled():
            return self._over_blocks(inputs, height, width)
        return super().forward(inputs)

    def _over_windows(self, inputs: Tensor, height: int, width: int) -> Tensor:
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
        # Flat, since of columns that are not contiguous a product image by image would be made.
        outputs = F.linear(columns.flatten(0, 2), weight, self.bias)
        return outputs.unflatten(0, (len(inputs), height, width)).permute(0, 3, 1, 2)

    def _over_blocks(self, inputs: Tensor, height: int, width: int) -> Tensor:
        stride = self.stride[0]
        input_pads: list[int] = []
        weight_pads: list[int] = []
        for outputs, size, padding, window in zip(
            (width, height),  # the last dimension first, as F.pad has it
            inputs.shape[:1:-1],
            cast(tuple[int, int], self.padding)[::-1],
            self.kernel_size[::-1],
            strict=True,
        ):
            blocks = math.ceil(window / stride)
            weight_pads += [0, blocks * stride - window]
            # After the last window nothing is read: what a stride leaves over there is cut off.
            input_pads += [padding, (outputs + blocks - 1) * stride - size - padding]
        of_blocks = F.pixel_unshuffle(F.pad(inputs, input_pads), stride)
        return F.conv2d(of_blocks, F.pixel_unshuffle(F.pad(self.weight, weight_pads), stride), self.bias)

    @staticmethod
    def can_be(module: nn.Module) -> bool:
        return (
            type(module) is nn.Conv2d
            and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
            and isinstance(module.padding, tuple)
        )
