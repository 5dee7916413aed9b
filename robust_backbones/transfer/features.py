"""Features of images by several backbones at once: each image is read and augmented once, whoever looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.models import NormalizedModel
from robust_backbones.transfer.networks import feature_extractor


@dataclass
class FrozenBackbone:
    """One of the backbones that are probed together."""

    label: str
    checkpoint: Checkpoint
    extractor: NormalizedModel
    """Images in [0, 1] -> features (N, D); its batch norms may be trained."""


class Features:
    """The backbones of a probe, and the features that they give.

    Args:
        trained_statistics: batch norms may be put in train mode: the networks themselves run, in autocast. Otherwise
            their folded twins do, which are the same function in eval mode, and faster.
        normalize: as for ``feature_extractor``.
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
        self.backbones = [
            FrozenBackbone(label, checkpoint, feature_extractor(checkpoint, normalize=normalize))
            for label, checkpoint in checkpoints.items()
        ]
        self._networks: list[nn.Module] = []
        for backbone in self.backbones:
            network: nn.Module = backbone.extractor.to(compute.device)
            if not trained_statistics:
                network = FoldedTwin(backbone.extractor, compute.dtype)
            self._networks.append(network.to(memory_format=torch.channels_last))
        self._autocast = trained_statistics

    @torch.no_grad()
    def of(
        self,
        images: ClassificationDataset,
        *,
        batch_size: int,
        workers: int,
        description: str,
        train_statistics: bool = False,
    ) -> list[Tensor]:
        """Features of every image in order, (N, D) float32 a backbone.

        Args:
            train_statistics: normalise by each batch's statistics, and let the running ones follow.
        """
        parts: list[list[Tensor]] = [[] for _ in self.backbones]
        for network in self._networks:
            network.train(train_statistics)
        batches = val_batches(images, batch_size, workers=workers)
        for pixels, _ in tqdm(batches, desc=description, unit="batch", disable=None, leave=False):
            pixels = self.compute.to_unit_range(pixels)
            for part, network in zip(parts, self._networks, strict=True):
                if self._autocast:
                    with self.compute.autocast():
                        part.append(network(pixels).float())
                else:
                    part.append(network(pixels))
        return [torch.cat(part) for part in parts]
