"""Nearest neighbours: precision, recall, density and coverage of samples, and memorisation (are they copies?)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 4096


class Nearest(NamedTuple):
    """The k nearest reference points of every query, nearest first."""

    distances: Tensor
    """float32 [N, k], Euclidean"""
    indices: Tensor
    """int64 [N, k]"""


def nearest(queries: Tensor, reference: Tensor, k: int = 1) -> Nearest:
    """The k nearest of reference [M, ...] for each query [N, ...]; uint8 and float inputs, flattened per point.

    The reference is walked in chunks, so 60,000 images need the memory of a few thousand. Candidates are found by a
    matrix product, and their distances then computed directly: a copy has distance 0, not a rounding error of the
    product. Raises ValueError when the reference has fewer than k points.
    """
    if len(reference) < k:
        raise ValueError(f"{k} neighbours asked of a reference of {len(reference)} points")
    # About a common centre the product loses fewer digits.
    centre = reference[:CHUNK].flatten(1).float().mean(dim=0)
    points = queries.flatten(1).float() - centre
    best = torch.full((len(points), k), torch.inf)
    indices = torch.zeros(len(points), k, dtype=torch.int64)
    for start in range(0, len(reference), CHUNK):
        chunk = reference[start : start + CHUNK].flatten(1).float() - centre
        # |q - r|^2 without |q|^2, which is the same for all candidates of a query.
        scores = torch.addmm(chunk.square().sum(dim=1), points, chunk.T, alpha=-2)
        values, found = scores.topk(min(k, len(chunk)), dim=1, largest=False)
        best, order = torch.cat([best, values], dim=1).topk(k, dim=1, largest=False)
        indices = torch.cat([indices, found + start], dim=1).gather(1, order)
    distances = torch.stack(
        [(queries.flatten(1).float() - reference[column].flatten(1).float()).norm(dim=1) for column in indices.T], dim=1
    )
    distances, order = distances.sort(dim=1)
    return Nearest(distances, indices.gather(1, order))


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real points whose neighbourhood holds a fake one (Naeem et al. 2020, eq. 7): 1 is best.

    A neighbourhood is the ball around a real point [N, ...] that reaches to its k-th nearest other real point. The
    value depends on N, M and k: put ``coverage(real, other_real, k)`` with the same sizes beside it.
    """
    # The nearest of all is the point itself.
    radii = nearest(real, real, k + 1).distances[:, -1]
    return float((nearest(real, fake, 1).distances[:, 0] <= radii).float().mean())


class Manifolds(NamedTuple):
    """How two sets of points lie in each other's neighbourhoods."""

    precision: float
    """Share of fake points inside the neighbourhood of any real one: quality."""
    recall: float
    """Share of real points inside the neighbourhood of any fake one: variety."""
    density: float
    """Mean number of real neighbourhoods that a fake point lies in, over k: like precision, but a single outlier with
    a wide neighbourhood does not raise it to the top; 1 is what real points reach, more is possible."""


def manifolds(real: Tensor, fake: Tensor, k: int = 5) -> Manifolds:
    """Precision and recall (Kynkäänniemi et al. 2019) and density (Naeem et al. 2020) of points [N, D].

    A neighbourhood reaches to the k-th nearest other point of its own set. The values depend on both sizes and on k.
    Raises ValueError where a set has no more than k points.
    """
    real_radii, fake_radii = (nearest(points, points, k + 1).distances[:, -1] for points in (real, fake))
    neighbourhoods = torch.zeros(len(fake))
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(real), CHUNK):
        rows = slice(start, start + CHUNK)
        # the direct form: a copy has distance 0, not a rounding error
        distances = torch.cdist(real[rows].float(), fake.float(), compute_mode="donot_use_mm_for_euclid_dist")
        neighbourhoods += (distances <= real_radii[rows, None]).sum(0)
        recalled[rows] = (distances <= fake_radii).any(1)
    return Manifolds(
        float((neighbourhoods > 0).float().mean()), float(recalled.float().mean()), float(neighbourhoods.mean()) / k
    )


class Memorised(NamedTuple):
    """How near samples lie to the training set, against how near held-out images lie."""

    share: float
    """Share of samples nearer to a training image than ``threshold``."""
    threshold: float
    """The percentile of the held-out images' distances to the training set."""
    median_ratio: float | None
    """Median distance of the samples over the median of the held-out images: well under 1 is copying."""


def memorised_share(samples: Tensor, train: Tensor, test: Tensor, percentile: float = 1) -> Memorised:
    """Share of samples that lie as near to a training image as only ``percentile`` % of held-out images do.

    Fresh draws of the true distribution score ``percentile`` / 100, copies of training images 1. Points [N, ...] of one
    space: features, or pixels. Raises ValueError for an empty set.
    """
    if not len(samples) or not len(test):
        raise ValueError("a memorised share needs samples and held-out images")
    held_out = nearest(test, train).distances[:, 0]
    found = nearest(samples, train).distances[:, 0]
    threshold = float(torch.quantile(held_out, percentile / 100))
    # An exact copy counts even where duplicates among the held-out images push the threshold to 0.
    share = float((found <= threshold).float().mean())
    middle = float(held_out.median())
    return Memorised(share, threshold, float(found.median()) / middle if middle else None)
