"""Convolutions that are slow on CPUs, computed by other operations with the same result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

_FEW_PIXELS = 16
_FEW_CHANNELS = 4

Pair = tuple[int, int]


def fast(device: str | torch.device = "cpu") -> AbstractContextManager[object]:
    """Within this context, convolutions of this thread that are slow on CPUs run differently; no module changes.

    ``with cpu.fast(device): ...`` does nothing if ``device`` is a GPU. It applies to float32 and bfloat16 inputs on
    CPUs and convolutions without groups and dilation:

    - An output of fewer than 16 pixels is a matrix product over the windows of the whole batch. PyTorch convolves image
      by image: those of res5 at 64 px, with outputs of 2 x 2 pixels, take three times as long.
    - A strided convolution of at most 4 channels whose input has a gradient, as a ResNet's stem under attack, is one of
      stride 1 over blocks of stride x stride pixels: the gradient of a strided one is slow.

    Results are those of PyTorch up to rounding.
    """
    return _FastConvolutions() if torch.device(device).type == "cpu" else nullcontext()


class _FastConvolutions(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = _convolution if func is torch.conv2d else func
        return function(*args, **(kwargs or {}))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` by the fastest method on CPUs."""
    known = (
        isinstance(input, Tensor)
        and input.ndim == 4
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.bfloat16)
        and groups == 1
        and _pair(dilation) == (1, 1)
        and not isinstance(padding, str)
    )
    if not known:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    window, steps, border = cast(Pair, tuple(weight.shape[2:])), tuple(_pair(stride)), tuple(_pair(padding))
    output = cast(
        Pair,
        tuple(
            (size + 2 * pad - side) // step + 1
            for size, pad, side, step in zip(input.shape[2:], border, window, steps, strict=True)
        ),
    )
    if min(output) < 1:  # PyTorch says that the image is too small
        return F.conv2d(input, weight, bias, stride, padding)
    if math.prod(output) < _FEW_PIXELS:
        return _over_windows(input, weight, bias, steps, border, output)
    strided = steps[0] == steps[1] > 1 and weight.shape[1] <= _FEW_CHANNELS
    if strided and input.requires_grad and torch.is_grad_enabled():
        return _over_blocks(input, weight, bias, steps[0], border, output)
    return F.conv2d(input, weight, bias, stride, padding)


def _over_windows(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, output: Pair
) -> Tensor:
    window = cast(Pair, tuple(weight.shape[2:]))
    columns = inputs.permute(0, 2, 3, 1)
    if (window, stride, padding) != ((1, 1), (1, 1), (0, 0)):
        columns = _Windows.apply(columns, window, stride, padding, output)
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # no copy where channels come last
    # Flat: of columns that are not contiguous, linear would make a product an image.
    outputs = F.linear(columns.flatten(0, 2), rows, bias)
    return outputs.unflatten(0, (len(inputs), *output)).permute(0, 3, 1, 2)


def _over_blocks(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Pair, output: Pair
) -> Tensor:
    input_pads: list[int] = []
    weight_pads: list[int] = []
    # F.pad takes the last dimension first.
    for axis in (1, 0):
        size, window = inputs.shape[2 + axis], weight.shape[2 + axis]
        blocks = math.ceil(window / stride)
        weight_pads += [0, blocks * stride - window]
        # Nothing is read after the last window: a negative pad cuts off what the stride leaves over.
        input_pads += [padding[axis], (output[axis] + blocks - 1) * stride - size - padding[axis]]
    blocked_inputs = F.pixel_unshuffle(F.pad(inputs, input_pads), stride)
    blocked_weight = F.pixel_unshuffle(F.pad(weight, weight_pads), stride)
    return F.conv2d(blocked_inputs, blocked_weight, bias)


class _Windows(torch.autograd.Function):
    """The window of each output of a convolution: (N, H, W, C) -> (N, height, width, pixels of the window * C).

    A single function, because separate slices would each have a gradient of the input's size, to be filled and added.
    """

    @staticmethod
    def forward(inputs: Tensor, window: Pair, stride: Pair, padding: Pair, output: Pair) -> Tensor:
        above, beside = padding
        padded = F.pad(inputs, (0, 0, beside, beside, above, above)) if above or beside else inputs
        return torch.cat([padded[place] for place in _places(window, stride, output)], dim=3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.geometry = inputs[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        window, stride, (above, beside), output = ctx.geometry
        images, height, width, channels = ctx.shape
        padded = gradient.new_zeros(images, height + 2 * above, width + 2 * beside, channels)
        for place, part in zip(_places(window, stride, output), gradient.split(channels, dim=3), strict=True):
            padded[place].add_(part)
        return padded[:, above : above + height, beside : beside + width], None, None, None, None


def _places(window: Pair, stride: Pair, output: Pair) -> Iterator[tuple[slice, slice, slice]]:
    """For each pixel of the window, row by row, the padded pixels (N, H, W, C) that all outputs have there."""
    for top in range(window[0]):
        for left in range(window[1]):
            rows = slice(top, top + stride[0] * (output[0] - 1) + 1, stride[0])
            yield slice(None), rows, slice(left, left + stride[1] * (output[1] - 1) + 1, stride[1])
