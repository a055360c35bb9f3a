"""Does a prior know what it knows? Its probability of the most likely id, beside how often that id comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Predictions in bins, from the least confident to the most; each list has one entry a bin."""

    count: list[int]
    confidence: list[float]
    """Mean probability given to the most likely id."""
    accuracy: list[float]
    """Share of them that came."""

    @property
    def expected_error(self) -> float:
        """Mean over all predictions of |accuracy - confidence| of their bin: 0 at best."""
        total = sum(self.count)
        gaps = (abs(a - c) for a, c in zip(self.accuracy, self.confidence, strict=True))
        return sum(n * gap for n, gap in zip(self.count, gaps, strict=True)) / total


def calibrate(confidence: Tensor, hit: Tensor) -> Calibration:
    """Calibration of probabilities [N] of the most likely id, and whether (bool [N]) it was the one that came.

    Expected calibration error (Guo et al. 2017, eq. 3) with 15 bins of equal count (Nguyen and O'Connor 2015), not of
    equal width: with thousands of ids nearly all probabilities are small and would share one bin. Few predictions raise
    it, for chance moves the accuracy of a bin. Raises ValueError for no predictions.
    """
    if not len(confidence):
        raise ValueError("a calibration needs predictions")
    ordered, places = confidence.double().sort()
    came = hit[places].double()
    split = (each.tensor_split(min(NUM_BINS, len(came))) for each in (ordered, came))
    bins = list(zip(*split, strict=True))
    return Calibration(
        count=[len(sure) for sure, _ in bins],
        confidence=[float(sure.mean()) for sure, _ in bins],
        accuracy=[float(right.mean()) for _, right in bins],
    )


def summary(confidence: Tensor, hit: Tensor) -> dict[str, Any]:
    """Expected calibration error, mean confidence and accuracy of predictions of any shape, and their bins."""
    found = calibrate(confidence.flatten(), hit.flatten())
    return {
        "expected_calibration_error": found.expected_error,
        "confidence": float(confidence.double().mean()),
        "accuracy": float(hit.double().mean()),
        "bins": {"count": found.count, "confidence": found.confidence, "accuracy": found.accuracy},
    }


def measure_calibration(confidence: Tensor, hit: Tensor, ends: dict[str, int]) -> dict[str, Any]:
    """Calibration of a prior on tokens of fixed length, over all, by scale and by position.

    ``confidence`` and ``hit`` are [N, L, F] over N images; ``ends`` says by name where each scale ends. By position
    stand confidence and accuracy alone: with one token an image an expected error would be mostly chance.
    """
    starts = [0, *ends.values()]
    return {
        "num_images": len(confidence),
        **summary(confidence, hit),
        "scales": [
            {"scale": name, **summary(confidence[:, start:end], hit[:, start:end])}
            for (name, end), start in zip(ends.items(), starts, strict=False)
        ],
        "confidence_by_position": confidence.double().mean((0, 2)).tolist(),
        "accuracy_by_position": hit.double().mean((0, 2)).tolist(),
    }
