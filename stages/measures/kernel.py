"""Kernel distance of two sets of features: the squared maximum mean discrepancy under a cubic polynomial kernel.

With Inception's features it is KID (Bińkowski et al. 2018). Unlike a Fréchet distance its estimate is unbiased: values
of different N compare, only their spread grows as N falls, and equal distributions may score slightly below zero.
torchmetrics takes longer to import than torch, so it is imported when a distance is measured, not for a report of one.
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
    """Features of each side in one subset."""


def kernel_distance(real: Tensor, judged: Tensor, seed: int) -> KernelDistance:
    """Mean of the unbiased estimates of 100 random subsets of features [N, D] and [M, D], in float64.

    The kernel is (x·y / D + 1)^3. A subset has 1,000 of each side, or half of the smaller side, so that subsets differ
    and their spread says something. Raises ValueError for fewer than 4 features on a side.
    """
    from torchmetrics.image.kid import poly_mmd

    fewest = min(len(real), len(judged))
    if fewest < 4:
        raise ValueError(f"a kernel distance needs 4 features of each side or more, not {fewest}")
    size = min(LARGEST_SUBSET, fewest // 2)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(NUM_SUBSETS):
        first, second = (side[torch.randperm(len(side), generator=generator)[:size]] for side in (real, judged))
        values.append(poly_mmd(first.double(), second.double()))
    found = torch.stack(values)
    return KernelDistance(float(found.mean()), float(found.std(correction=0)), size)
