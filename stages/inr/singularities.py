"""Where an image is singular: maxima of the modulus of its wavelet transform (Mallat and Hwang 1992).

The wavelets are the derivatives of a Gaussian: the modulus is that of the gradient of the smoothed image, times the
scale, and a maximum is one along the gradient's direction. Edges are maxima at the same place over many scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FAINTEST_SHARE = 1e-3
"""Share of the largest modulus below which a maximum counts as noise of the arithmetic."""
COARSEST_SHARE = 1 / 16
"""Coarsest scale as a share of the longer side."""


@dataclass(frozen=True)
class Singularities:
    """n maxima of all scales; none of a constant image."""

    places: Tensor
    """Coordinates (x, y) as of the pixels, [n, 2]."""
    directions: Tensor
    """The gradient's direction (x, y) of length 1, [n, 2]."""
    moduli: Tensor
    """Grey levels times pixels of smoothing a pixel, above 0, [n]."""
    scales: Tensor
    """Deviation of the smoothing in pixels, a power of two, [n]."""


def find_singularities(image: Tensor) -> Singularities:
    """Those of the mean of the channels of a float image [C, H, W]."""
    grey = image.mean(dim=0)
    height, width = grey.shape
    found = []
    for octave in range(1 + max(0, int(math.log2(max(max(height, width) * COARSEST_SHARE, 1))))):
        gradient = gradients(smoothed(grey, 2.0**octave))
        modulus = gradient.norm(dim=0) * 2.0**octave
        direction = gradient / gradient.norm(dim=0).clamp(min=1e-12)
        ahead, behind = beside(modulus, direction), beside(modulus, -direction)
        y, x = ((modulus >= ahead) & (modulus > behind)).nonzero(as_tuple=True)
        places = torch.stack((2 * x + 1 - width, 2 * y + 1 - height), dim=-1) / max(height, width)
        scales = torch.full((len(x),), 2.0**octave)
        found.append((places, direction[:, y, x].T, modulus[y, x], scales))
    places, directions, moduli, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = moduli > max(FAINTEST_SHARE * float(moduli.max()), 1e-6) if len(moduli) else moduli > 0
    return Singularities(places[kept], directions[kept], moduli[kept], scales[kept])


def smoothed(grey: Tensor, deviation: float) -> Tensor:
    """An image [H, W] under a Gaussian of so many pixels; its borders are repeated outwards."""
    reach = math.ceil(3 * deviation)
    kernel = (-0.5 * (torch.arange(-reach, reach + 1) / deviation).square()).exp()
    kernel = kernel / kernel.sum()
    padded = functional.pad(grey[None, None], (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel[None, None, None, :]), kernel[None, None, :, None])[0, 0]


def gradients(grey: Tensor) -> Tensor:
    """Central differences (x, y) of an image [H, W]: [2, H, W]."""
    padded = functional.pad(grey[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    return torch.stack((padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1])) / 2


def beside(values: Tensor, direction: Tensor) -> Tensor:
    """``values`` [H, W] one pixel further in each pixel's ``direction`` [2, H, W], between pixels interpolated."""
    height, width = values.shape
    x = torch.arange(width) + direction[0]
    y = torch.arange(height)[:, None] + direction[1]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return functional.grid_sample(values[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
