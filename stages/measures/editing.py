"""Measures of editing: how well an image shows the new class and keeps the frozen scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.measures.classifier import Classifier
from stages.measures.upsampling import consistency


def others_of(labels: Tensor, seed: int) -> Tensor:
    """For each image, the index of a random image of another class: int64 [N] from class ids int64 [N].

    The choice depends on ``seed`` only. Raises ValueError if all images have the same class.
    """
    if len(labels.unique()) < 2:
        raise ValueError(f"{len(labels)} images of one class only; give images of at least two classes")
    generator = torch.Generator().manual_seed(seed)
    different = (labels[:, None] != labels[None, :]).float()
    return torch.multinomial(different, 1, generator=generator)[:, 0]


def measure_edited(classifier: Classifier, made: Tensor, classes: Tensor, small: Tensor) -> dict[str, Any]:
    """Class probability and consistency of edited uint8 images ``made`` [N, C, H, H].

    ``classes`` int64 [N] are the new classes. ``small`` [N, C, h, h] are the originals, reduced by averaging to the
    size of the frozen scales; the edited images are reduced and compared with them.
    """
    probabilities = classifier.probabilities(made)
    return {
        "probability_of_new_class": float(probabilities.gather(1, classes[:, None]).mean()),
        "classified_as_new_class": float((probabilities.argmax(1) == classes).double().mean()),
        "consistency_psnr": consistency(made, small),
    }
