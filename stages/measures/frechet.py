"""Fréchet distance between two sets of features, in float64.

With EfficientNet-Lite0's pooled features it is called ``fd_lite0``. It is not comparable with FID, which uses another
network and has another scale. Like FID it is biased upwards for few samples, so it is always reported together with the
distance between clean images at the same N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FRECHET_MINIMUM = 2048
"""Minimum number of images; with fewer, the bias of the covariance dominates and the value is marked."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] in float64, with the number of samples used."""

    mean: Tensor
    covariance: Tensor
    count: int


def fit_gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features [N, D] (unbiased covariance). Raises ValueError for N < 2 or non-finite features."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; allowed: [N, D] with N of 2 or more")
    features = features.double()
    if not torch.isfinite(features).all():
        raise ValueError("features have NaN or infinite values; allowed: finite values")
    mean = features.mean(dim=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance between two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2).

    The product under the root is symmetric, so two symmetric eigendecompositions suffice. They are faster than the
    eigenvalues of S1 S2, real by construction, and defined for singular covariances (N <= D).
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    means = (a.mean - b.mean).square().sum()
    traces = a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    # rounding can make the distance of equal Gaussians negative
    return max(0.0, float(means + traces))


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between two sets of features [N, D] and [M, D]."""
    return frechet_distance(fit_gaussian(a), fit_gaussian(b))


def measure_frechet(real: Tensor, judged: Tensor, reference: str, same_backbone_as_loss: bool) -> dict[str, Any]:
    """Fréchet distance between two sets of features [N, D] and [M, D], with everything it depends on.

    ``bias`` is the warning to print beside the value if N is too small, or None.
    """
    fewest = min(len(real), len(judged))
    too_few = fewest < FRECHET_MINIMUM
    return {
        "value": frechet(real, judged),
        "num_reference": len(real),
        "num_judged": len(judged),
        "reference": reference,
        "too_few_images": too_few,
        "bias": f"N = {fewest:,} < {FRECHET_MINIMUM:,}: biased; compare only at equal N" if too_few else None,
        "same_backbone_as_loss": same_backbone_as_loss,
    }
