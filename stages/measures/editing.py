"""Editing measured: does the new prompt show, and does the image keep what was frozen?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.measures.classifier import Classifier
from stages.measures.upsampling import consistency


def others_of(labels: Tensor, seed: int) -> Tensor:
    """For each image one of another class, int64 [N] from classes int64 [N]; the same seed gives the same choice.

    Raises ValueError where all images are of one class.
    """
    if len(labels.unique()) < 2:
        raise ValueError("images of one class only: none has another class")
    generator = torch.Generator().manual_seed(seed)
    different = (labels[:, None] != labels[None, :]).float()
    return torch.multinomial(different, 1, generator=generator)[:, 0]


def measure_edited(classifier: Classifier, made: Tensor, classes: Tensor, small: Tensor) -> dict[str, Any]:
    """How much uint8 images ``made`` [N, C, H, H] look like ``classes`` int64 [N], and, reduced, like ``small``.

    ``small`` [N, C, h, h] are the originals reduced by averaging to the size of the frozen scales.
    """
    probabilities = classifier.probabilities(made)
    return {
        "probability_of_new_class": float(probabilities.gather(1, classes[:, None]).mean()),
        "classified_as_new_class": float((probabilities.argmax(1) == classes).double().mean()),
        "consistency_psnr": consistency(made, small),
    }
