import copy

import pytest
import torch
from torch import nn

from robust_backbones.convolutions import Convolution, multiply_few_pixels


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
    multiply_few_pixels(twin)
    assert type(twin) is Convolution
    inputs = torch.randn(3, 6, *size).contiguous(memory_format=layout)
    points = [inputs.double().requires_grad_(), inputs.requires_grad_()]
    outputs = [convolution(points[0]), twin(points[1])]
    weight = torch.randn(outputs[0].shape)
    gradients = [
        torch.autograd.grad(output, [point, *layer.parameters()], weight.to(output.dtype))
        for output, point, layer in zip(outputs, points, (convolution, twin), strict=True)
    ]
    for exact, found in (outputs, *zip(*gradients, strict=True)):
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "other",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU()],
)
def test_other_layers_stay_what_they_are(other: nn.Module) -> None:
    kind = type(other)
    multiply_few_pixels(other)
    assert type(other) is kind
