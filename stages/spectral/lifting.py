"""LeGall 5/3 and CDF 9/7 by lifting (Daubechies and Sweldens 1998), the filters of JPEG 2000.

- A signal is split into even and odd samples. Each step adds a multiple of the two neighbors to one half, so the
  inverse runs the same steps backward, for any border mode.
- Low-pass coefficients are at even samples, high-pass coefficients at odd samples. Order, sign and (in orthonormal
  scaling) magnitude are those of PyWavelets' ``bior2.2`` and ``bior4.4``.
- ``symmetric`` borders mirror the signal at its first and last sample, which suits filters of odd length: nothing wraps
  around, and there are as many coefficients as samples. ``periodization`` is the mode of that name in PyWavelets.
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
    """Low-pass and high-pass halves of an even number of samples along ``dim``, which is -2 or -1."""
    weights, gain = LIFTED[wavelet]
    parts = [x[..., 0::2], x[..., 1::2]] if dim == -1 else [x[..., 0::2, :], x[..., 1::2, :]]
    for number, weight in enumerate(weights):
        parts[1 - number % 2] = _step(parts, number, weight, dim, boundary)
    low_factor, high_factor = _factors(gain, scaling)
    return parts[0] * low_factor, parts[1] * high_factor


def join(low: Tensor, high: Tensor, dim: int, wavelet: str, scaling: Scaling, boundary: Boundary) -> Tensor:
    """The inverse of ``split``."""
    weights, gain = LIFTED[wavelet]
    factors = _factors(gain, scaling)
    parts = [low / factors[0], high / factors[1]]
    for number, weight in reversed(list(enumerate(weights))):
        parts[1 - number % 2] = _step(parts, number, -weight, dim, boundary)
    return torch.stack(parts, dim=dim).flatten(dim - 1, dim)


def _step(parts: list[Tensor], number: int, weight: float, dim: int, boundary: Boundary) -> Tensor:
    """One lifting step: the odd (for even ``number``) or even samples plus ``weight`` times both neighbors."""
    updated, source = (parts[1], parts[0]) if number % 2 == 0 else (parts[0], parts[1])
    length = source.shape[dim]
    first, last = source.narrow(dim, 0, 1), source.narrow(dim, length - 1, 1)
    if number % 2 == 0:  # the other neighbor of an odd sample is the next even sample
        other = torch.cat((source.narrow(dim, 1, length - 1), last if boundary == "symmetric" else first), dim)
    else:
        other = torch.cat((first if boundary == "symmetric" else last, source.narrow(dim, 0, length - 1)), dim)
    return torch.add(updated, source + other, alpha=weight)


def _factors(gain: float, scaling: Scaling) -> tuple[float, float]:
    """Factors for the low-pass filter, so that its sum is 1 (or √2 as in PyWavelets), and for the high-pass filter."""
    size = 1.0 if scaling == "averaging" else math.sqrt(2)
    return size / gain, -size * gain / 2
