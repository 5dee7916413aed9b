"""Convolutions that CPUs are slow at, as other operations of the same result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        columns = inputs.permute(0, 2, 3, 1)
        padding = cast(tuple[int, int], self.padding)
        if (self.kernel_size, self.stride, padding) != ((1, 1), (1, 1), (0, 0)):
            columns = cast(Tensor, _Windows.apply(columns, self.kernel_size, self.stride, padding, (height, width)))
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # no copy: channels come last
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


class _Windows(torch.autograd.Function):
    """What each output of a convolution sees: (N, H, W, C) -> (N, height, width, pixels of the window * C).

    By itself each pixel of the window would have a gradient of the size of the input, to be filled and added.
    """

    @staticmethod
    def forward(
        inputs: Tensor,
        window: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        outputs: tuple[int, int],
    ) -> Tensor:
        above, beside = padding
        padded = F.pad(inputs, (0, 0, beside, beside, above, above)) if above or beside else inputs
        return torch.cat([padded[place] for place in _places(window, stride, outputs)], dim=3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.geometry = inputs[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        window, stride, (above, beside), outputs = ctx.geometry
        images, height, width, channels = ctx.shape
        padded = gradient.new_zeros(images, height + 2 * above, width + 2 * beside, channels)
        for place, part in zip(_places(window, stride, outputs), gradient.split(channels, dim=3), strict=True):
            padded[place].add_(part)
        return padded[:, above : above + height, beside : beside + width], None, None, None, None


def _places(
    window: tuple[int, int], stride: tuple[int, int], outputs: tuple[int, int]
) -> Iterator[tuple[slice, slice, slice]]:
    """For each pixel of a convolution's window, row by row, where in the padded images (N, H, W, C) outputs see it."""
    (down, right), (height, width) = stride, outputs
    for top in range(window[0]):
        for left in range(window[1]):
            rows = slice(top, top + down * (height - 1) + 1, down)
            yield slice(None), rows, slice(left, left + right * (width - 1) + 1, right)
