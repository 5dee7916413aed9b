"""Batch norms whose statistics are over the batches of all processes, on CPUs too, for which torch has none."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

M = TypeVar("M", bound=nn.Module)


def synchronize_batch_norms(model: M, device: torch.device) -> M:
    """``model`` with batch statistics taken over the batches of all processes, so that their number does not matter."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synchronize_on_cpu(model, nn.BatchNorm2d)


def synchronize_on_cpu(model: M, layer: type[nn.Module]) -> M:
    """``model`` with its batch norms of type ``layer`` replaced by ones that synchronise without a GPU.

    As with torch's ``convert_sync_batchnorm``, the new ones hold the old ones' parameters and statistics; a ``model``
    that is itself a batch norm is left alone, and the new one returned.
    """
    if isinstance(model, layer):
        assert isinstance(model, nn.BatchNorm2d | nn.SyncBatchNorm)
        norm = _CpuSyncBatchNorm(model.num_features, model.eps, model.momentum, model.affine)
        norm.weight, norm.bias = model.weight, model.bias
        norm.running_mean, norm.running_var = model.running_mean, model.running_var
        norm.num_batches_tracked = model.num_batches_tracked
        return cast(M, norm.train(model.training))
    for name, child in model.named_children():
        setattr(model, name, synchronize_on_cpu(child, layer))
    return model


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm does, which needs a GPU; written for clarity, not for speed."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        x = input.float()
        count = all_reduce(torch.tensor(float(x.numel() // x.shape[1])))
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centered = x - mean[:, None, None]
        variance = all_reduce((centered**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)
        normalized = centered * torch.rsqrt(variance + self.eps)[:, None, None]
        return (normalized * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)
