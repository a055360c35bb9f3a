"""The real images of an evaluation, and what they ask of a prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.reading import read_eval, validation_indices
from data.images.source import ImageSource
from pipeline.errors import RunError
from pipeline.models import Models
from stages.contract import Prompts
from stages.measures.classifier import thumbnails


@dataclass(frozen=True)
class Images:
    """Real images of one side."""

    pixels: Tensor
    """uint8 [N, C, H, W], full size or thumbnails."""
    labels: Tensor
    """int64 [N]; -1 for none."""
    indices: list[int]
    """Where each lies in its source."""
    texts: list[str]
    """Captions; empty for none."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Images:
        """Some of the images, in the order of ``rows`` int64 [n]."""
        places = rows.tolist()
        return Images(
            self.pixels[rows],
            self.labels[rows],
            [self.indices[place] for place in places],
            [self.texts[place] for place in places],
        )


def read_images(source: ImageSource, config: ImagesConfig, count: int, small: bool = False) -> Images:
    """The first ``count`` images (or all) of a fixed permutation; ``small`` keeps only thumbnails of 32 px."""
    views = (read_eval(source, index, config) for index in validation_indices(len(source), count, config.split_seed))
    rows = [
        (thumbnails(view.pixels.unsqueeze(0))[0] if small else view.pixels, view.label, view.index, view.text)
        for view in views
        if view.readable
    ]
    if not rows:
        raise RunError("none of the images can be read")
    pixels, labels, indices, texts = zip(*rows, strict=True)
    return Images(torch.stack(pixels), torch.tensor(labels), list(indices), list(texts))


def prompts_of(models: Models, labels: Tensor, texts: list[str]) -> Prompts:
    """Prompts of images with class ids int64 [N] and captions, as far as the prior knows of them."""
    told = models.prior.condition
    return models.prompts(
        labels.tolist() if told.uses_labels else [-1] * len(labels), texts if told.uses_text else [""] * len(labels)
    )
