"""Samples measured against held-out images, each number beside the same number for real training images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stages.measures.neighbours import coverage, memorised_share


def measure_coverage(held_out: Tensor, drawn: Tensor, train: Tensor, k: int, space: str) -> dict[str, Any]:
    """Coverage of the held-out features by the samples', and by as many training images: the best to hope for."""
    return {
        "value": coverage(held_out, drawn, k),
        "baseline_of_real_images": coverage(held_out, train[: len(drawn)], k),
        "k": k,
        "num_reference": len(held_out),
        "num_judged": len(drawn),
        "num_baseline": min(len(train), len(drawn)),
        "features": space,
    }


def measure_memorised(drawn: Tensor, train: Tensor, held_out: Tensor, space: str) -> dict[str, Any]:
    """Share of near-copies among samples, with the share that fresh images of the data would have."""
    found = memorised_share(drawn, train, held_out, percentile=1)
    return {
        "share": found.share,
        "expected_of_fresh_images": 0.01,
        "threshold": found.threshold,
        "median_distance_over_held_out": found.median_ratio,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "space": space,
    }
