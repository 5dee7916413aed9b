"""Detectron2's trainers, but losses stay on the device until some twenty of them are read at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor

PERIOD = 20
"""As often as Detectron2's writers write."""


class _ReadsLater:
    """Changes how a SimpleTrainer logs. A loss that is not finite is noticed when it is read."""

    iter: int

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._unread: list[tuple[int, float, dict[str, Tensor]]] = []

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], data_time: float, *_: Any, **__: Any) -> None:
        self._unread.append((self.iter, data_time, {name: loss.detach() for name, loss in loss_dict.items()}))
        if (self.iter + 1) % PERIOD == 0:
            self.read_losses()

    def read_losses(self) -> None:
        """Log all losses that have not been read, each at its iteration, as Detectron2 does; every process calls it.

        Raises:
            FloatingPointError: one is not finite.
        """
        if not self._unread:
            return
        values = iter(torch.stack([loss for *_, losses in self._unread for loss in losses.values()]).tolist())
        own = [(step, seconds, {name: next(values) for name in losses}) for step, seconds, losses in self._unread]
        self._unread.clear()
        storage = get_event_storage()
        for step, seconds, _ in own:
            storage.put_scalar("rank_data_time", seconds, cur_iter=step)
        for rows in zip(*comm.gather(own), strict=True):  # the first process's, the others get none
            step, mean = rows[0][0], {name: sum(row[2][name] for row in rows) / len(rows) for name in rows[0][2]}
            if not math.isfinite(total := sum(mean.values())):
                raise FloatingPointError(f"Loss became infinite or NaN at iteration={step}!\nloss_dict = {mean}")
            slowest = max(seconds for _, seconds, _ in rows)
            storage.put_scalars(cur_iter=step, data_time=slowest, total_loss=total, **mean)


class DeferredTrainer(_ReadsLater, SimpleTrainer):
    """For float32 and bfloat16."""


class DeferredAMPTrainer(_ReadsLater, AMPTrainer):
    """For float16."""
