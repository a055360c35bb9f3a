"""What ``eval`` measures: one config section, ``eval``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Sizes and settings of an evaluation; every one is written beside the numbers."""

    name: str = "default"
    """The result goes to ``<run>/eval/<name>``."""
    num_images: int = 1000
    """Held-out images that are reconstructed and compared with; fewer where the set is smaller."""
    num_samples: int = 1000
    """Images sampled from the prior, classes in equal shares."""
    batch_size: int = 100
    """Images at once in reconstruction and sampling; changes speed only."""
    seed: int = 0
    """Sample i is drawn with seed + i."""
    classifier: bool = True
    """Train a small classifier on the training images for class accuracy, coverage and memorisation."""
    classifier_steps: int = 1500
    """Its training steps of 128 images."""
    neighbours: int = 5
    """k of coverage: a real image's neighbourhood reaches to its k-th nearest real image."""
    num_train_reference: int = 60000
    """Training images among which nearest neighbours are searched; the whole set where it is smaller."""
