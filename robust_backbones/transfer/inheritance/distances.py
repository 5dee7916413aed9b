"""How far data sets are from each other in a network's feature space, by optimal transport."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.errors import InputError
from robust_backbones.transfer.features import Features
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.sets import Memory, RelatedSet

Points = NDArray[np.float64]
"""Shape (N, D)."""
_LARGEST_EXPONENT = 500.0
"""exp(-this) is still far from float64's smallest number; beyond it Sinkhorn's steps are taken in logarithms."""


def wasserstein(x: Points, y: Points) -> float:
    """The 2-Wasserstein distance between two samples, every point of each weighing the same, exactly.

    W_2 = sqrt(min_P Σ_ij P_ij ‖x_i - y_j‖²), by the network simplex algorithm (Bonneel et al. 2011).
    """
    ot = load_library()
    return math.sqrt(max(0.0, float(ot.emd2([], [], ot.dist(x, y), numItermax=10_000_000))))


def sinkhorn(x: Points, y: Points, *, regularization: float) -> float:
    """The same for the transport plan that Sinkhorn's iterations find (Cuturi 2013, arXiv 1306.0895).

    The plan minimises Σ P_ij C_ij - r H(P), r being ``regularization`` x the mean cost; what is returned is
    sqrt(Σ P_ij C_ij), without the entropy. It goes to W_2 from above as r goes to 0.
    """
    ot = load_library()
    costs = ot.dist(x, y)
    r = regularization * float(costs.mean())
    if r == 0:
        return 0.0
    method = "sinkhorn" if costs.max() / r < _LARGEST_EXPONENT else "sinkhorn_log"
    # Marginals that are wrong by less than 1e-7 of the mass change the distance in its seventh digit.
    plan = ot.sinkhorn([], [], costs, r, method=method, numItermax=10_000, stopThr=1e-7)
    return math.sqrt(float((plan * costs).sum()))


def distances(
    config: InheritanceConfig,
    checkpoint: Checkpoint,
    pretraining: ClassificationDataset,
    sets: Mapping[str, RelatedSet],
    compute: Compute,
    memory: Memory,
) -> tuple[dict[str, float], int]:
    """Of every set to the training images of pre-training, in the network's last features (the classifier's input).

    Each is between samples of the same number of images, since with more of them distances become smaller.

    Returns:
        ``wasserstein/SET`` and ``sinkhorn/SET``, in the units of the features; and that number. Where a set is of the
        same distribution as pre-training, it is not 0: that is the floor of samples so large.
    """
    count = min(config.distance_images, len(pretraining), *(len(related.images) for related in sets.values()))
    network = Features({"": checkpoint}, compute)

    def features(images: ClassificationDataset, name: str) -> Points:
        sample = images.sample(count, seed=config.data_seed)
        workers = memory.workers_for(images)
        (found,) = network.of(sample, batch_size=128, workers=workers, description=f"features of {name}")
        return np.asarray(found.double().cpu().numpy(), dtype=np.float64)

    reference = features(pretraining, "pre-training")
    metrics: dict[str, float] = {}
    for name, related in sets.items():
        points = features(related.images, name)
        metrics[f"wasserstein/{name}"] = wasserstein(reference, points)
        metrics[f"sinkhorn/{name}"] = sinkhorn(reference, points, regularization=config.sinkhorn_regularization)
    return metrics, count


def load_library() -> Any:
    """The package POT; its import takes a second."""
    try:
        import ot
    except ImportError:
        raise InputError("distances need POT: pip install POT, or --distance-images 0 to leave them out") from None
    return ot
