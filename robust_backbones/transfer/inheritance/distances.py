"""Distances between data sets in a network's feature space, by optimal transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.errors import InputError
from robust_backbones.transfer.features import Features
from robust_backbones.transfer.inheritance.config import InheritanceConfig
from robust_backbones.transfer.inheritance.sets import RelatedSet

Points = NDArray[np.float64]
"""Shape (N, D)."""
Labels = NDArray[np.int64]
"""Shape (N,)."""
_LARGEST_EXPONENT = 500.0
"""exp(-this) is still far from float64's smallest number; beyond it Sinkhorn runs in the log domain."""


def wasserstein(x: Points, y: Points) -> float:
    """The exact 2-Wasserstein distance between two samples with uniform weights.

    W_2 = sqrt(min_P Σ_ij P_ij ‖x_i - y_j‖²), by the network simplex algorithm (Bonneel et al. 2011).
    """
    ot = load_library()
    return math.sqrt(max(0.0, float(ot.emd2([], [], ot.dist(x, y), numItermax=10_000_000))))


def sinkhorn(x: Points, y: Points, *, regularization: float) -> float:
    """The same for the transport plan found by Sinkhorn's iterations (Cuturi 2013, arXiv 1306.0895).

    The plan minimises Σ P_ij C_ij - r H(P), where r is ``regularization`` x the mean cost; the result is sqrt(Σ P_ij
    C_ij), without the entropy. It converges to W_2 from above as r goes to 0.
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


def gaussian(x: Points, y: Points) -> float:
    """The 2-Wasserstein distance between the normal distributions with the samples' means and covariances (n - 0).

    W_2² = ‖m_x - m_y‖² + tr(S_x + S_y - 2 (S_x^½ S_y S_x^½)^½) (Dowson & Landau 1982). With S = AᵀA of the centred
    points over √n, the last trace is the sum of the singular values of A_x A_yᵀ: as many as there are points.
    """
    a, b = ((points - points.mean(axis=0)) / math.sqrt(len(points)) for points in (x, y))
    cross = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    means = float(((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum())
    return math.sqrt(max(0.0, means + float((a**2).sum() + (b**2).sum()) - 2 * cross))


def otdd(
    x: Points, x_labels: Labels, y: Points, y_labels: Labels, *, inner: Callable[[Points, Points], float]
) -> float:
    """The optimal transport data-set distance (Alvarez-Melis & Fusi 2020, arXiv 2002.02923, section 4, p = 2).

    sqrt(min_P Σ_ij P_ij (‖x_i - y_j‖² + W_2²(α_a, α_b))) for labels a of i and b of j, where α_a is the points of class
    a: classes are compared by their images, and their names do not matter.

    Args:
        inner: W_2 between two classes: ``wasserstein``, exact, or ``gaussian``, the paper's approximation.
    """
    ot = load_library()
    costs = ot.dist(x, y)
    for a in np.unique(x_labels):
        for b in np.unique(y_labels):
            rows, columns = x_labels == a, y_labels == b
            costs[np.ix_(rows, columns)] += inner(x[rows], y[columns]) ** 2
    return math.sqrt(max(0.0, float(ot.emd2([], [], costs, numItermax=10_000_000))))


def distances(
    config: InheritanceConfig,
    checkpoint: Checkpoint,
    pretraining: ClassificationDataset,
    sets: Mapping[str, RelatedSet],
    compute: Compute,
    *,
    workers: int,
) -> tuple[dict[str, float], int]:
    """The distance of every set to the pre-training images, in the network's last features (the classifier's input).

    All are between samples with the same number of images, because distances shrink with more images.

    Returns:
        ``NAME/SET``, in the units of the features, for the NAME that --distance gives (``wasserstein`` and ``sinkhorn``
        for w2); and that number. For a set with the same distribution as pre-training, the distance is not 0 but the
        floor for samples of that size.
    """
    count = min(config.distance_images, len(pretraining), *(len(related.images) for related in sets.values()))
    network = Features({"": checkpoint}, compute)

    def features(images: ClassificationDataset, name: str) -> tuple[Points, Labels]:
        sample = images.sample(count, seed=config.data_seed)
        (found,) = network.of(sample, workers=workers, description=f"features of {name}")
        return np.asarray(found.double().cpu().numpy(), dtype=np.float64), np.asarray(sample.labels)

    reference, classes = features(pretraining, "pre-training")
    metrics: dict[str, float] = {}
    for name, related in sets.items():
        points, labels = features(related.images, name)
        if config.distance != "w2":
            inner = wasserstein if config.distance == "otdd" else gaussian
            metrics[f"{config.distance}/{name}"] = otdd(reference, classes, points, labels, inner=inner)
            continue
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
