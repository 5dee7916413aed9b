"""Features of images from several backbones at once: each image is read and augmented only once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute, single_values_refused
from robust_backbones.classification.folding import twin_of
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.transfer.networks import feature_extractor

EVALUATION_BATCH = 128
"""Images that go through a network in eval mode at once."""


class Features:
    """The features of several backbones.

    Args:
        trained_statistics: batch norms may be put in train mode, so the networks themselves run, in autocast. Otherwise
            their folded twins run: the same function in eval mode, but faster.
        normalize: as for ``feature_extractor``.

    Attributes:
        extractors: by label, images in [0, 1] -> features (N, D); their batch norms may be trained.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        compute: Compute,
        *,
        trained_statistics: bool = False,
        normalize: bool = True,
    ) -> None:
        self.compute = compute
        self.extractors = {
            label: feature_extractor(checkpoint, normalize=normalize).to(compute.device)
            for label, checkpoint in checkpoints.items()
        }
        self._context = compute.autocast if trained_statistics else nullcontext
        self._networks: list[nn.Module] = [
            (one if trained_statistics else twin_of(one, compute.dtype)).to(memory_format=torch.channels_last)
            for one in self.extractors.values()
        ]

    @torch.no_grad()
    def of(
        self,
        images: ClassificationDataset,
        *,
        workers: int,
        description: str,
        batch_size: int = EVALUATION_BATCH,
        train_statistics: bool = False,
    ) -> list[Tensor]:
        """Features of every image in order, (N, D) float32 per backbone.

        Args:
            train_statistics: normalise by each batch's statistics, and update the running ones.
        """
        parts: list[list[Tensor]] = [[] for _ in self._networks]
        for network in self._networks:
            network.train(train_statistics)
        batches = val_batches(images, batch_size, workers=workers)
        for pixels, _ in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
            pixels = self.compute.to_unit_range(pixels)
            for part, network in zip(parts, self._networks, strict=True):
                with single_values_refused(), self._context():
                    part.append(network(pixels).float())
        return [torch.cat(part) for part in parts]
