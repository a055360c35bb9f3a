"""Kernel distance of two sets of features: the squared maximum mean discrepancy under a cubic polynomial kernel.

With Inception's features it is KID (Bińkowski et al. 2018). Unlike a Fréchet distance, its estimate is unbiased: values
at different N are comparable, only their spread grows as N decreases. Equal distributions can score slightly below
zero. torchmetrics takes longer to import than torch, so it is imported only to measure a distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_SUBSETS = 100
LARGEST_SUBSET = 1000


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets."""

    mean: float
    std: float
    subset_size: int
    """Features per side in one subset."""


def kernel_distance(real: Tensor, judged: Tensor, seed: int) -> KernelDistance:
    """Mean of the unbiased estimates over 100 random subsets of features [N, D] and [M, D], in float64.

    The kernel is (x·y / D + 1)^3. A subset has 1,000 features per side, or half of the smaller side if that is less, so
    that subsets differ and their spread is meaningful. Raises ValueError for fewer than 4 features on a side.
    """
    from torchmetrics.image.kid import poly_mmd

    fewest = min(len(real), len(judged))
    if fewest < 4:
        raise ValueError(f"one side has {fewest} features; a kernel distance needs at least 4 features per side")
    size = min(LARGEST_SUBSET, fewest // 2)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(NUM_SUBSETS):
        first, second = (side[torch.randperm(len(side), generator=generator)[:size]] for side in (real, judged))
        values.append(poly_mmd(first.double(), second.double()))
    estimates = torch.stack(values)
    return KernelDistance(float(estimates.mean()), float(estimates.std(correction=0)), size)
