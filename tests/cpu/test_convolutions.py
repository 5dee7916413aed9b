import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from robust_backbones import cpu


class Strides(TorchFunctionMode):
    """The strides that PyTorch's convolutions are called with in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.seen.append(args[3] if len(args) > 3 else 1)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 3), (7, 8)])
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), ((1, 3), (2, 1), (0, 1)), (7, 2, 3)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_few_pixels_is_a_matrix_product(
    size: tuple[int, int], window: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    """Where it is one (few pixels) and where it stays a convolution: output and all gradients, against float64."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 4, window, stride, padding, bias=size != (2, 2)).double()
    twin = copy.deepcopy(convolution).float().to(memory_format=layout)
    inputs = torch.randn(3, 6, *size).contiguous(memory_format=layout)
    points = [inputs.double().requires_grad_(), inputs.requires_grad_()]
    with cpu.fast():
        outputs = [convolution(points[0]), twin(points[1])]
    weight = torch.randn(outputs[0].shape)
    gradients = [
        torch.autograd.grad(output, [point, *layer.parameters()], weight.to(output.dtype))
        for output, point, layer in zip(outputs, points, (convolution, twin), strict=True)
    ]
    for exact, found in (outputs, *zip(*gradients, strict=True)):
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("side", "window", "stride"), [(1, 2, 2), (2, 4, 4), (2, 3, 1), (2, 5, 1)])
def test_an_image_smaller_than_the_window_is_refused_as_by_pytorch(side: int, window: int, stride: int) -> None:
    convolution, inputs = nn.Conv2d(3, 4, window, stride), torch.zeros(2, 3, side, side, requires_grad=True)
    with cpu.fast(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        convolution(inputs)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (10, 13), (31, 22)])
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(7, 2, 3), (3, 2, 1), (3, 2, 0), (2, 2, 0), (1, 2, 0), (4, 4, 0), (5, 3, 1), ((3, 4), 3, (1, 0)), (5, 3, 4)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_strided_convolution_of_few_channels_is_one_over_blocks(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    window: int,
    stride: int,
    padding: int,
    layout: torch.memory_format,
) -> None:
    """Where inputs have a gradient: output and all gradients, against float64."""
    monkeypatch.setattr("robust_backbones.cpu.convolutions._FEW_PIXELS", 0)
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, window, stride, padding, bias=size != (8, 8)).double()
    twin = copy.deepcopy(convolution).float().to(memory_format=layout)
    inputs = torch.randn(2, 3, *size).contiguous(memory_format=layout)
    points = [inputs.double().requires_grad_(), inputs.clone().requires_grad_()]
    with Strides() as strides, cpu.fast():
        outputs = [convolution(points[0]), twin(points[1])]
        assert twin(inputs).shape == outputs[0].shape
    own = (stride, stride)
    assert strides.seen == [own, 1, own]  # the twin's has stride 1 where it pays
    weight = torch.randn(outputs[0].shape) / outputs[0][0, 0].numel() ** 0.5  # float32's errors add up over pixels
    gradients = [
        torch.autograd.grad(output, [point, *layer.parameters()], weight.to(output.dtype))
        for output, point, layer in zip(outputs, points, (convolution, twin), strict=True)
    ]
    for exact, found in (outputs, *zip(*gradients, strict=True)):
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, stride=2).double(),
    ],
)
def test_other_convolutions_are_pytorchs(other: nn.Conv2d) -> None:
    inputs = torch.randn(2, 4, 5, 5, dtype=other.weight.dtype, requires_grad=True)
    with cpu.fast():
        outputs = other(inputs)
    assert torch.equal(outputs, other(inputs))


def test_nothing_is_fast_unasked() -> None:
    """Neither outside the context nor in it for a GPU; the module stays what it is."""
    convolution = nn.Conv2d(4, 8, 3)
    inputs = torch.randn(2, 4, 4, 4)
    state, kind = {**convolution.state_dict()}, type(convolution)
    with Strides() as plain, cpu.fast("cuda"):
        convolution(inputs)
    with Strides() as replaced, cpu.fast():
        convolution(inputs)
    assert (plain.seen, replaced.seen) == ([(1, 1)], [])
    assert type(convolution) is kind
    assert convolution.state_dict().keys() == state.keys()
    assert torch.overrides._get_current_function_mode() is None
