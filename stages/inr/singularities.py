"""Singularities of an image: maxima of the modulus of its wavelet transform (Mallat and Hwang 1992).

The wavelets are derivatives of a Gaussian. So the modulus is the gradient norm of the smoothed image, times the scale,
and maxima are taken along the direction of the gradient. Edges are maxima at the same place in many scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FAINTEST_SHARE = 1e-3
"""Fraction of the largest modulus below which a maximum counts as rounding noise."""
COARSEST_SHARE = 1 / 16
"""Coarsest scale as a fraction of the longer side."""


@dataclass(frozen=True)
class Singularities:
    """n maxima over all scales; n = 0 for a constant image."""

    places: Tensor
    """Coordinates (x, y), in the units of pixel coordinates (``stages.inr.fit.coordinates``), [n, 2]."""
    directions: Tensor
    """Directions (x, y) of the gradient, of length 1, [n, 2]."""
    moduli: Tensor
    """Gradient in gray levels per pixel times ``scales``, above 0, [n]."""
    scales: Tensor
    """Standard deviation of the smoothing in pixels, a power of two, [n]."""


def find_singularities(image: Tensor) -> Singularities:
    """Singularities of the channel mean of a float image [C, H, W]."""
    gray = image.mean(dim=0)
    height, width = gray.shape
    maxima = []
    for octave in range(1 + max(0, int(math.log2(max(max(height, width) * COARSEST_SHARE, 1))))):
        gradient = gradients(smoothed(gray, 2.0**octave))
        modulus = gradient.norm(dim=0) * 2.0**octave
        direction = gradient / gradient.norm(dim=0).clamp(min=1e-12)
        ahead, behind = beside(modulus, direction), beside(modulus, -direction)
        y, x = ((modulus >= ahead) & (modulus > behind)).nonzero(as_tuple=True)
        places = torch.stack((2 * x + 1 - width, 2 * y + 1 - height), dim=-1) / max(height, width)
        scales = torch.full((len(x),), 2.0**octave)
        maxima.append((places, direction[:, y, x].T, modulus[y, x], scales))
    places, directions, moduli, scales = (torch.cat(parts) for parts in zip(*maxima, strict=True))
    kept = moduli > max(FAINTEST_SHARE * float(moduli.max()), 1e-6) if len(moduli) else moduli > 0
    return Singularities(places[kept], directions[kept], moduli[kept], scales[kept])


def smoothed(grey: Tensor, deviation: float) -> Tensor:
    """Smooth an image [H, W] with a Gaussian of this standard deviation in pixels, with replicated borders."""
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
    """Values of ``values`` [H, W] one pixel away in the ``direction`` [2, H, W] of each pixel, interpolated."""
    height, width = values.shape
    x = torch.arange(width) + direction[0]
    y = torch.arange(height)[:, None] + direction[1]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return functional.grid_sample(values[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
