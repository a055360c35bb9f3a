"""Nearest-neighbor measures: precision, recall, density and coverage of samples, and memorization of training data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 4096


class Nearest(NamedTuple):
    """The k nearest reference points of every query, nearest first."""

    distances: Tensor
    """Euclidean distances, float32 [N, k]."""
    indices: Tensor
    """Indices into the reference, int64 [N, k]."""


def nearest(queries: Tensor, reference: Tensor, k: int = 1) -> Nearest:
    """The k nearest points of ``reference`` [M, ...] for each query [N, ...]; inputs are uint8 or float, flattened.

    The reference is processed in chunks, so 60,000 images need the memory of a few thousand. Candidates are found by a
    matrix product and their distances are then computed directly, so a copy has distance 0 and not the rounding error
    of the product. Raises ValueError if the reference has fewer than k points.
    """
    if len(reference) < k:
        raise ValueError(f"the reference has {len(reference)} points; allowed for k={k} neighbors: {k} or more")
    # centering the points reduces rounding errors of the product
    centre = reference[:CHUNK].flatten(1).float().mean(dim=0)
    points = queries.flatten(1).float() - centre
    best = torch.full((len(points), k), torch.inf)
    indices = torch.zeros(len(points), k, dtype=torch.int64)
    for start in range(0, len(reference), CHUNK):
        chunk = reference[start : start + CHUNK].flatten(1).float() - centre
        # |q - r|^2 without |q|^2, which is the same for all candidates of a query
        scores = torch.addmm(chunk.square().sum(dim=1), points, chunk.T, alpha=-2)
        values, chunk_indices = scores.topk(min(k, len(chunk)), dim=1, largest=False)
        best, order = torch.cat([best, values], dim=1).topk(k, dim=1, largest=False)
        indices = torch.cat([indices, chunk_indices + start], dim=1).gather(1, order)
    distances = torch.stack(
        [(queries.flatten(1).float() - reference[column].flatten(1).float()).norm(dim=1) for column in indices.T], dim=1
    )
    distances, order = distances.sort(dim=1)
    return Nearest(distances, indices.gather(1, order))


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real points whose neighborhood contains a fake point (Naeem et al. 2020, eq. 7); 1 is best.

    The neighborhood of a real point [N, ...] is the ball that reaches to its k-th nearest other real point. The value
    depends on N, M and k; compare it with ``coverage(real, other_real, k)`` at the same sizes.
    """
    # k + 1, because the nearest point is the point itself
    radii = nearest(real, real, k + 1).distances[:, -1]
    return float((nearest(real, fake, 1).distances[:, 0] <= radii).float().mean())


class Manifolds(NamedTuple):
    """Overlap of two sets of points."""

    precision: float
    """Share of fake points inside the neighborhood of any real point: quality."""
    recall: float
    """Share of real points inside the neighborhood of any fake point: diversity."""
    density: float
    """Mean number of real neighborhoods that contain a fake point, divided by k. Like precision, but robust to a single
    outlier with a large neighborhood. Real points score 1; higher values are possible."""


def manifolds(real: Tensor, fake: Tensor, k: int = 5) -> Manifolds:
    """Precision and recall (Kynkäänniemi et al. 2019) and density (Naeem et al. 2020) of points [N, D].

    A neighborhood reaches to the k-th nearest other point of the same set. The values depend on both sizes and on k.
    Raises ValueError if a set has no more than k points.
    """
    real_radii, fake_radii = (nearest(points, points, k + 1).distances[:, -1] for points in (real, fake))
    num_neighborhoods = torch.zeros(len(fake))
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(real), CHUNK):
        rows = slice(start, start + CHUNK)
        # direct computation: a copy has distance 0, not a rounding error
        distances = torch.cdist(real[rows].float(), fake.float(), compute_mode="donot_use_mm_for_euclid_dist")
        num_neighborhoods += (distances <= real_radii[rows, None]).sum(0)
        recalled[rows] = (distances <= fake_radii).any(1)
    return Manifolds(
        float((num_neighborhoods > 0).float().mean()),
        float(recalled.float().mean()),
        float(num_neighborhoods.mean()) / k,
    )


class Memorised(NamedTuple):
    """Distance of samples to the training set, compared with that of held-out images."""

    share: float
    """Share of samples whose distance to a training image is at most ``threshold``."""
    threshold: float
    """Percentile of the held-out images' distances to the training set."""
    median_ratio: float | None
    """Median distance of the samples divided by that of the held-out images; well below 1 means copying."""


def memorised_share(samples: Tensor, train: Tensor, test: Tensor, percentile: float = 1) -> Memorised:
    """Share of samples that are as close to a training image as only ``percentile`` % of held-out images are.

    Fresh draws from the true distribution score ``percentile`` / 100, copies of training images score 1. All points
    [N, ...] are in one space: features or pixels. Raises ValueError for an empty set.
    """
    if not len(samples) or not len(test):
        raise ValueError(
            f"{len(samples)} samples and {len(test)} held-out images; a memorized share needs at least one of each"
        )
    held_out = nearest(test, train).distances[:, 0]
    distances = nearest(samples, train).distances[:, 0]
    threshold = float(torch.quantile(held_out, percentile / 100))
    # <=, so that an exact copy counts even if duplicates among the held-out images make the threshold 0
    share = float((distances <= threshold).float().mean())
    held_out_median = float(held_out.median())
    return Memorised(share, threshold, float(distances.median()) / held_out_median if held_out_median else None)
