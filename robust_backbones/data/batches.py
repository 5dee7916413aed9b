"""Batches of an epoch, over any number of processes and from any step on."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from robust_backbones.data.datasets import ClassificationDataset, init_worker, mix
from robust_backbones.errors import InputError, plural


def steps_per_epoch(dataset: ClassificationDataset, batch_size: int, *, keep_last: bool = False) -> int:
    """Optimiser steps of an epoch; ``batch_size`` is global. An incomplete last one may count too."""
    return -(-len(dataset) // batch_size) if keep_last else len(dataset) // batch_size


def check_fills_batch(name: str, images: int, batch_size: int) -> None:
    """Raise InputError if a data set has fewer training images than a batch."""
    if images < batch_size:
        raise InputError(f"{name} has {plural(images, 'image')} to train on, less than a batch: lower --batch-size")


def train_batches(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    micro_batch_size: int,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int,
    keep_last: bool = False,
) -> DataLoader:
    """One epoch of micro-batches in an order that depends only on (seed, epoch).

    Step s consists of images s * batch_size to (s + 1) * batch_size of the order; rank r gets the r-th part of them, in
    ``batch_size / world_size / micro_batch_size`` consecutive micro-batches. An incomplete last step is dropped,
    unless ``keep_last``.

    Args:
        batch_size: images of one optimiser step, over all ranks.
        micro_batch_size: images that one rank gets at once.
        keep_last: for one process without micro-batches; the last batch is then smaller.
        first_step: the first step; images of earlier steps are not loaded.

    Raises:
        InputError: the batch does not split evenly; the epoch ends before ``first_step``.
    """
    if batch_size % (world_size * micro_batch_size):
        raise InputError(
            f"a batch of {plural(batch_size, 'image')} does not split into micro-batches of {micro_batch_size} on "
            f"{plural(world_size, 'process')}: choose a multiple of {world_size * micro_batch_size}"
        )
    steps = steps_per_epoch(dataset, batch_size)
    if not 0 <= first_step <= steps:
        raise InputError(f"cannot begin at step {first_step} of {steps}: was the data set larger when the run began")
    generator = torch.Generator().manual_seed(mix(dataset.seed, epoch, -1))
    whole = torch.randperm(len(dataset), generator=generator)
    order, rest = whole[: steps * batch_size], whole[steps * batch_size :].tolist()
    parts = order.view(steps, world_size, batch_size // world_size)[first_step:, rank]
    # The epoch is this loader's own: a loader made later does not change it.
    batches = parts.reshape(-1, micro_batch_size).tolist() + [rest] * (keep_last and bool(rest))
    return _loader(dataset.seen_through(dataset.transform, epoch=epoch), batches, workers)


def val_batches(
    dataset: ClassificationDataset, batch_size: int, *, rank: int = 0, world_size: int = 1, workers: int
) -> DataLoader:
    """Every image once, in order: rank r gets the r-th of ``world_size`` parts, which differ by at most one image."""
    start, stop = (len(dataset) * part // world_size for part in (rank, rank + 1))
    batches = [list(range(first, min(first + batch_size, stop))) for first in range(start, stop, batch_size)]
    return _loader(dataset, batches, workers)


def _loader(dataset: ClassificationDataset, batches: list[list[int]], workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=0 if dataset.in_memory else workers,
        worker_init_fn=init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # for the workers' seeds, which are else drawn from the global generator
    )
