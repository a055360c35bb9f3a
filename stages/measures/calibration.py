"""Calibration of a prior: its probability of the most likely id, compared with how often that id is correct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Predictions in bins, from the least to the most confident; each list has one entry per bin."""

    count: list[int]
    confidence: list[float]
    """Mean probability of the most likely id."""
    accuracy: list[float]
    """Share of predictions in which the most likely id is correct."""

    @property
    def expected_error(self) -> float:
        """Mean over all predictions of |accuracy - confidence| of their bin; 0 is best."""
        total = sum(self.count)
        gaps = (abs(a - c) for a, c in zip(self.accuracy, self.confidence, strict=True))
        return sum(n * gap for n, gap in zip(self.count, gaps, strict=True)) / total


def calibrate(confidence: Tensor, hit: Tensor) -> Calibration:
    """Calibration from the probabilities [N] of the most likely id, and whether it is correct, ``hit`` bool [N].

    Expected calibration error (Guo et al. 2017, eq. 3) with 15 bins of equal count (Nguyen and O'Connor 2015), not of
    equal width: with thousands of ids nearly all probabilities are small and would fall into one bin. With few
    predictions the error is too high, as chance moves the accuracy of each bin. Raises ValueError for no predictions.
    """
    if not len(confidence):
        raise ValueError("got 0 predictions; a calibration needs predictions, at least one")
    sorted_confidence, order = confidence.double().sort()
    sorted_hits = hit[order].double()
    split = (values.tensor_split(min(NUM_BINS, len(sorted_hits))) for values in (sorted_confidence, sorted_hits))
    bins = list(zip(*split, strict=True))
    return Calibration(
        count=[len(confidences) for confidences, _ in bins],
        confidence=[float(confidences.mean()) for confidences, _ in bins],
        accuracy=[float(hits.mean()) for _, hits in bins],
    )


def summary(confidence: Tensor, hit: Tensor) -> dict[str, Any]:
    """Expected calibration error, mean confidence, accuracy and bins of predictions of any shape."""
    calibration = calibrate(confidence.flatten(), hit.flatten())
    return {
        "expected_calibration_error": calibration.expected_error,
        "confidence": float(confidence.double().mean()),
        "accuracy": float(hit.double().mean()),
        "bins": {
            "count": calibration.count,
            "confidence": calibration.confidence,
            "accuracy": calibration.accuracy,
        },
    }


def measure_calibration(confidence: Tensor, hit: Tensor, ends: dict[str, int]) -> dict[str, Any]:
    """Calibration of a prior on tokens of fixed length: overall, per scale and per position.

    ``confidence`` and ``hit`` are [N, L, F] for N images; ``ends`` maps scale names to the ends of the scales.
    Per position there are only confidence and accuracy: with one token per image, an expected error would be mostly
    chance.
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
