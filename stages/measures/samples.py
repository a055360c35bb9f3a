"""Measures of samples against held-out images, each with the same measure of real training images as a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from stages.measures.frechet import measure_frechet
from stages.measures.kernel import kernel_distance
from stages.measures.neighbours import coverage, manifolds, memorised_share

HELD_OUT = "held-out images, in the set's own shares of classes"


def frechet_key(name: str) -> str:
    """Result key of the Fréchet distance in a backbone's features; only Inception's is called FID."""
    return "fid" if name == "inception" else f"fd_{name}"


@dataclass(frozen=True)
class Space:
    """The feature space of one backbone, with the features of real images."""

    name: str
    """lite0, classifier or inception; suffix of the result keys."""
    features: Callable[[Tensor], Tensor]
    """Computes features float32 [N, D] of uint8 images [N, C, H, W]."""
    held_out: Tensor
    """Features [M, D] of the held-out images."""
    real: Tensor
    """Features [N, D] of as many training images as there are samples."""
    same_backbone_as_loss: bool
    """Whether the tokenizer was trained against this backbone, which biases the measures in its favor."""

    def measure(self, drawn: Tensor, k: int, seed: int) -> dict[str, Any]:
        """Fréchet and kernel distance, precision, recall, density and coverage of the samples' features [N, D].

        Coverage, precision, recall and density need more than ``k`` points on each side and the kernel distance needs 4
        or more; otherwise they are left out.
        """
        same = {"same_backbone_as_loss": self.same_backbone_as_loss}
        fewest = min(len(self.held_out), len(drawn), len(self.real))
        measured: dict[str, Any] = {}
        key = frechet_key(self.name)
        for ending, judged in (("", drawn), ("_of_real_images", self.real)):
            measured[key + ending] = measure_frechet(self.held_out, judged, HELD_OUT, self.same_backbone_as_loss)
        if fewest >= 4:
            measured[f"kd_{self.name}"] = {
                **asdict(kernel_distance(self.held_out, drawn, seed)),
                "baseline_of_real_images": kernel_distance(self.held_out, self.real, seed).mean,
                **same,
            }
        if fewest > k:
            measured[f"manifold_{self.name}"] = {
                **manifolds(self.held_out, drawn, k)._asdict(),
                "baseline_of_real_images": manifolds(self.held_out, self.real, k)._asdict(),
                "k": k,
                "num_reference": len(self.held_out),
                "num_judged": len(drawn),
                **same,
            }
            measured[f"coverage_{self.name}"] = measure_coverage(self.held_out, drawn, self.real, k, self.name) | same
        return measured


def measure_coverage(held_out: Tensor, drawn: Tensor, train: Tensor, k: int, space: str) -> dict[str, Any]:
    """Coverage of the held-out features by those of the samples, and by as many training images as a baseline."""
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
    """Share of near-copies among samples, with the share expected of fresh images from the data distribution."""
    memorized = memorised_share(drawn, train, held_out, percentile=1)
    return {
        "share": memorized.share,
        "expected_of_fresh_images": 0.01,
        "threshold": memorized.threshold,
        "median_distance_over_held_out": memorized.median_ratio,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "space": space,
    }
