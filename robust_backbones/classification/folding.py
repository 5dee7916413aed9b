"""The folded twin that attacks run on: always in eval mode, batch norms folded into convolutions, any precision."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from robust_backbones.classification.compute import autocast
from robust_backbones.models import NormalizedModel


def twin_of(model: NormalizedModel, dtype: torch.dtype = torch.float32) -> FoldedTwin | Unfolded:
    """What attacks run on: the folded twin of a network, or the network itself if there is nothing to fold."""
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return FoldedTwin(model, dtype) if has_norms else Unfolded(model, dtype)


class Unfolded(nn.Module):
    """A network without batch norms, used instead of a twin: in autocast, in the mode set by the attack."""

    def __init__(self, model: NormalizedModel, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def refresh(self) -> None:
        """Does nothing: its weights are the model's."""

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], shape (N, 3, H, W) -> float32 logits (N, classes)."""
        with autocast(images.device, self.dtype):
            return self.model(images).float()


class FoldedTwin(nn.Module):
    """A copy of a network that attacks run on: the same function as ``model.eval()``, faster.

    A batch norm in eval mode is one scale and one shift per channel. If its input comes only from a convolution, both
    are folded into the convolution's weights, in float32, which are then cast. Mean and std are not folded into the
    stem, because its zero padding comes after normalisation. The twin has its own tensors; ``refresh`` copies the
    model's current ones in place, so compiled graphs stay valid.

    The images, their gradient and the logits are float32; only the network between them runs in ``dtype``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: NormalizedModel, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self._source = [model]  # in a list, so that it does not become a submodule
        self.register_buffer("mean", model.mean.clone(), persistent=False)
        self.register_buffer("std", model.std.clone(), persistent=False)
        self.network = copy.deepcopy(model.backbone).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        self._folds = _convolutions_before_batch_norms(model.backbone)
        for convolution_name, batch_norm_name in self._folds.items():
            convolution = cast(nn.Conv2d, self.network.get_submodule(convolution_name))
            if convolution.bias is None:
                convolution.bias = nn.Parameter(torch.zeros_like(convolution.weight[:, 0, 0, 0]), requires_grad=False)
            # timm's norms hold the activation that comes after them.
            activation = getattr(self.network.get_submodule(batch_norm_name), "act", nn.Identity())
            self.network.set_submodule(batch_norm_name, activation.eval())
        for name, module in [*self.network.named_modules()]:
            if type(module) is nn.MaxPool2d and not module.return_indices:
                self.network.set_submodule(name, _MaxPool(module).eval())
        for module in self.network.modules():
            if not isinstance(module, _BatchNorm):  # those left over keep their statistics in float32
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's current weights; needed before every attack, because steps and statistics change them."""
        source = self._source[0].backbone
        tensors = dict(source.named_parameters()) | dict(source.named_buffers()) | self._folded(source)
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        torch._foreach_copy_(list(own.values()), [tensors[name] for name in own])

    def _folded(self, source: nn.Module) -> dict[str, Tensor]:
        """The convolutions' weights and biases with their batch norms, in batched calls to save Python overhead."""
        if not self._folds:
            return {}
        convolutions: list[Any] = [source.get_submodule(name) for name in self._folds]
        norms: list[Any] = [source.get_submodule(name) for name in self._folds.values()]
        scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
        scales = torch._foreach_mul(torch._foreach_rsqrt(scales), [norm.weight for norm in norms])
        shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
        shifts = torch._foreach_sub([norm.bias for norm in norms], shifts)
        columns = [scale[:, None, None, None] for scale in scales]
        weights = torch._foreach_mul([convolution.weight for convolution in convolutions], columns)
        folded = {f"{name}.weight": weight for name, weight in zip(self._folds, weights, strict=True)}
        for name, convolution, scale, shift in zip(self._folds, convolutions, scales, shifts, strict=True):
            folded[f"{name}.bias"] = shift if convolution.bias is None else shift + convolution.bias * scale
        return folded

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], shape (N, 3, H, W) -> float32 logits (N, classes)."""
        return self.network(((images - self.mean) / self.std).to(self.dtype)).float()

    def train(self, mode: bool = True) -> FoldedTwin:
        """Does nothing: a twin is always in eval mode."""
        return self


class _MaxPool(nn.Module):
    """A max pooling that recomputes its indices in the backward pass.

    Stored, they take eight bytes per output in any precision; the input is stored anyway, by the activation before it.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.pool, inputs, use_reentrant=False, preserve_rng_state=False)


def _convolutions_before_batch_norms(backbone: nn.Module) -> dict[str, str]:
    """Names of the convolutions whose output goes to one batch norm and nowhere else -> names of those batch norms."""
    modules = dict(backbone.named_modules())
    folds: dict[str, str] = {}
    for node in _nodes(backbone):
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        before, activation = node.args[0], getattr(modules[node.target], "act", nn.Identity())
        is_alone = before.op == "call_module" and _is_linear(modules[before.target]) and len(before.users) == 1
        if is_alone and not [*activation.parameters()]:
            folds[before.target] = node.target
    return folds


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a plain convolution by its weight, with any padding; some of timm's scale the weight first."""
    return type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"


def _nodes(backbone: nn.Module) -> list[Any]:
    """The network's operations; none if its code depends on values of tensors, which a trace does not have."""
    try:
        return list(_Tracer().trace(backbone).nodes)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return []


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules without a batch norm between convolutions need not be traced."""
        return isinstance(m, _BatchNorm) or not any(isinstance(module, _BatchNorm) for module in m.modules())
