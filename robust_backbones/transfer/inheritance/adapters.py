"""Trainable additions to a frozen network: low-rank updates of its weights, and a frame of pixels around images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_backbones.models import BackboneSpec, NormalizedModel, only_in_timm
from robust_backbones.transfer.networks import classifier_name


class _Frozen(NormalizedModel):
    """A frozen network, including its batch norm statistics, except for what a subclass adds."""

    def __init__(self, backbone: nn.Module, spec: BackboneSpec) -> None:
        super().__init__(backbone, spec)
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> _Frozen:
        super().train(mode)
        self.backbone.eval()
        return self


class LowRankLayer(nn.Module):
    """A frozen layer W, linear or a convolution of one group, plus scale x B A: A is like W with ``rank`` outputs, B is
    linear or 1 x 1."""

    down: nn.Conv2d | nn.Linear
    up: nn.Conv2d | nn.Linear

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            self.down = nn.Conv2d(layer.in_channels, rank, *window, bias=False)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Conv2d | nn.Linear:
        """The layer with weight W + scale x B A, which is the same function."""
        product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)  # (out, rank) @ (rank, in * k * k)
        self.layer.weight += self.scale * product.view_as(self.layer.weight)
        return self.layer


class LowRankModel(_Frozen):
    """LoRA (Hu et al. 2021, arXiv 2106.09685, equation 3): W_0 + alpha / rank x B A with B = 0 at first.

    The paper updates the queries and values of attention. Here every convolution without groups has an update, because
    most networks have no attention, and in timm's networks every linear layer except the classifier; queries, keys and
    values are one layer there. Depthwise and grouped convolutions, norms and the classifier stay frozen.

    Args:
        seed: draws A, as PyTorch draws a convolution.
    """

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__(backbone, spec)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            classifier, of_timm = classifier_name(spec), only_in_timm(spec.arch)
            for name, layer in list(backbone.named_modules()):
                is_convolution = type(layer) is nn.Conv2d and layer.groups == 1
                if is_convolution or (of_timm and isinstance(layer, nn.Linear) and name != classifier):
                    backbone.set_submodule(name, LowRankLayer(layer, rank, alpha / rank))

    def merge(self) -> None:
        """Add every update to its weight, so that the backbone has its original layers again."""
        for name, layer in list(self.backbone.named_modules()):
            if isinstance(layer, LowRankLayer):
                self.backbone.set_submodule(name, layer.merged())


class PromptedModel(_Frozen):
    """A visual prompt (Bahng et al. 2022, arXiv 2203.17274): a learnt frame added to normalised images.

    It starts at 0, so that before training this is the network itself; the paper draws it from a normal distribution.

    Args:
        width: of the frame, in pixels.
        image_size: height and width of images.
    """

    frame: Tensor

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, *, width: int, image_size: int) -> None:
        super().__init__(backbone, spec)
        self.prompt = nn.Parameter(torch.zeros(3, image_size, image_size))
        frame = torch.ones(image_size, image_size)
        frame[width : image_size - width, width : image_size - width] = 0
        self.register_buffer("frame", frame, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        return super().normalize(images) + self.frame * self.prompt
