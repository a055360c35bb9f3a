"""LeGall 5/3 and CDF 9/7 by lifting (Daubechies and Sweldens 1998), the filters of JPEG 2000.

What is notable here:

- a signal is cut into its even and odd samples; each step adds a multiple of two neighbours to one of them, so the
  inverse is the same steps backwards, whatever happens at the borders;
- low-pass coefficients stand at even samples, high-pass ones at odd samples, with PyWavelets' order, sign and, in
  orthonormal scaling, size: ``bior2.2`` and ``bior4.4`` there;
- ``symmetric`` borders mirror the signal at its first and last sample, which fits filters of odd length: nothing wraps
  around and there are as many coefficients as samples. ``periodization`` is PyWavelets' mode of that name.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stages.spectral.names import LIFTED
from stages.spectral.pyramid import Scaling

Boundary = Literal["symmetric", "periodization"]


def split(x: Tensor, dim: int, wavelet: str, scaling: Scaling, boundary: Boundary) -> tuple[Tensor, Tensor]:
    """Low-pass and high-pass halves of an even number of samples along ``dim``, -2 or -1."""
    weights, gain = LIFTED[wavelet]
    parts = [x[..., 0::2], x[..., 1::2]] if dim == -1 else [x[..., 0::2, :], x[..., 1::2, :]]
    for number, weight in enumerate(weights):
        parts[1 - number % 2] = _step(parts, number, weight, dim, boundary)
    low, high = _factors(gain, scaling)
    return parts[0] * low, parts[1] * high


def join(low: Tensor, high: Tensor, dim: int, wavelet: str, scaling: Scaling, boundary: Boundary) -> Tensor:
    """The inverse of ``split``."""
    weights, gain = LIFTED[wavelet]
    factors = _factors(gain, scaling)
    parts = [low / factors[0], high / factors[1]]
    for number, weight in reversed(list(enumerate(weights))):
        parts[1 - number % 2] = _step(parts, number, -weight, dim, boundary)
    return torch.stack(parts, dim=dim).flatten(dim - 1, dim)


def _step(parts: list[Tensor], number: int, weight: float, dim: int, boundary: Boundary) -> Tensor:
    """The odd (even ``number``) or even samples with ``weight`` times both neighbours added."""
    changed, seen = (parts[1], parts[0]) if number % 2 == 0 else (parts[0], parts[1])
    length = seen.shape[dim]
    first, last = seen.narrow(dim, 0, 1), seen.narrow(dim, length - 1, 1)
    if number % 2 == 0:  # an odd sample's other neighbour is the next even one
        other = torch.cat((seen.narrow(dim, 1, length - 1), last if boundary == "symmetric" else first), dim)
    else:
        other = torch.cat((first if boundary == "symmetric" else last, seen.narrow(dim, 0, length - 1)), dim)
    return torch.add(changed, seen + other, alpha=weight)


def _factors(gain: float, scaling: Scaling) -> tuple[float, float]:
    """What makes the low-pass filter's sum 1, or PyWavelets' √2, and the high-pass filter PyWavelets' to match."""
    size = 1.0 if scaling == "averaging" else math.sqrt(2)
    return size / gain, -size * gain / 2
