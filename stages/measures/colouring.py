"""Colouring measured: chroma beside that of the originals, of a gray image and of the mean chroma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.measures.reconstruction import Judge, measure_distortion
from stages.spectral.colour import to_rgb, to_ycbcr


def chroma_of(pixels: Tensor) -> Tensor:
    """Cb and Cr float64 [N, 2, H, W], in 8-bit steps around 0, of uint8 images [N, 3, H, W]."""
    return torch.from_numpy(to_ycbcr(pixels.double().numpy()))[:, 1:]


def luma_of(pixels: Tensor) -> Tensor:
    """Y uint8 [N, 1, H, W] of uint8 images [N, 3, H, W]."""
    return torch.from_numpy(to_ycbcr(pixels.double().numpy()))[:, :1].round().clamp(0, 255).to(torch.uint8)


def with_chroma(gray: Tensor, chroma: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] of luma uint8 [N, 1, H, W] and Cb, Cr float64 [N, 2, H, W]."""
    planes = torch.cat([gray.double(), chroma.expand(len(gray), -1, *gray.shape[-2:])], dim=1)
    return torch.from_numpy(to_rgb(planes.numpy())).round().clamp(0, 255).to(torch.uint8)


def with_luma(made: Tensor, gray: Tensor) -> Tensor:
    """uint8 images with the chroma of ``made`` [N, 3, H, W] and the luma ``gray`` [N, 1, H, W].

    Colours that the given luma cannot have are cut off at black and white.
    """
    return with_chroma(gray, chroma_of(made))


def measure_coloured(made: Tensor, original: Tensor, judge: Judge | None) -> dict[str, Any]:
    """Distortion of coloured uint8 images against their originals, and how much colour they have.

    ``chroma_error`` is the root of the mean squared error of Cb and Cr, in 8-bit steps; ``saturation`` the mean length
    of (Cb, Cr), ``chroma_spread`` the standard deviation, over images, of an image's mean (Cb, Cr).
    """
    chroma, wanted = chroma_of(made), chroma_of(original)
    return {
        "chroma_error": float((chroma - wanted).square().mean().sqrt()),
        "saturation": float(chroma.norm(dim=1).mean()),
        "chroma_spread": float(chroma.mean((2, 3)).std(dim=0).square().sum().sqrt()),
        **measure_distortion(original, made, judge, "the originals of the gray images"),
    }
