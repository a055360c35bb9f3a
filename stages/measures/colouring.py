"""Measures of colorization: chroma error, saturation and distortion against the originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.measures.reconstruction import Judge, measure_distortion
from stages.spectral.colour import chroma_of


def measure_coloured(made: Tensor, original: Tensor, judge: Judge | None) -> dict[str, Any]:
    """Distortion of colorized uint8 images ``made`` against their originals, and the amount of color.

    ``chroma_error`` is the root mean squared error of Cb and Cr, in 8-bit steps; ``saturation`` is the mean length of
    (Cb, Cr); ``chroma_spread`` is the standard deviation over images of an image's mean (Cb, Cr).
    """
    errors, lengths, means = [], [], []
    for made_part, original_part in zip(made.split(256), original.split(256), strict=True):
        chroma = chroma_of(made_part)
        errors.append((chroma - chroma_of(original_part)).square().mean((1, 2, 3)))
        lengths.append(chroma.norm(dim=1).mean((1, 2)))
        means.append(chroma.mean((2, 3)))
    return {
        "chroma_error": float(torch.cat(errors).mean().sqrt()),
        "saturation": float(torch.cat(lengths).mean()),
        "chroma_spread": float(torch.cat(means).var(dim=0, correction=0).sum().sqrt()),
        **measure_distortion(original, made, judge, "the originals of the gray images"),
    }
