"""Orthogonal wavelets of PyWavelets by periodic convolution with their filters, and the inverse.

Coefficients equal ``pywt.dwt(…, mode="periodization")``. The inverse is the transpose, so it needs no other filters.
Signals may be shorter than the filter, which then wraps around several times.
"""

from __future__ import annotations

import math
from functools import lru_cache

import pywt
import torch
from torch import Tensor
from torch.nn import functional

from stages.spectral.pyramid import Scaling


@lru_cache
def taps(wavelet: str) -> Tensor:
    """float64 [2, L]: low-pass and high-pass filter, reversed for use in a correlation."""
    filters = pywt.Wavelet(wavelet)
    # always on the CPU: a network built on the meta device must not put meta tensors into the shared cache
    return torch.tensor([filters.dec_lo, filters.dec_hi], dtype=torch.float64, device="cpu").flip(1)


def split(x: Tensor, dim: int, wavelet: str, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Low-pass and high-pass halves of an even number of samples along ``dim``, which is -2 or -1."""
    kernel = _kernel(wavelet, dim, x) * (1 if scaling == "orthonormal" else math.sqrt(0.5))
    padding = taps(wavelet).shape[1] // 2 - 1
    padded = _periodic(x, dim, padding).unsqueeze(1)
    bands = functional.conv2d(padded, kernel, stride=(2, 1) if dim == -2 else (1, 2))
    low, high = (part.reshape(*x.shape[:-2], *part.shape[-2:]) for part in bands.unbind(1))
    return low, high


def join(low: Tensor, high: Tensor, dim: int, wavelet: str, scaling: Scaling) -> Tensor:
    """The inverse of ``split``."""
    kernel = _kernel(wavelet, dim, low) * (1 if scaling == "orthonormal" else math.sqrt(2))
    length = taps(wavelet).shape[1]
    padding = length // 4
    stacked = torch.stack([_periodic(part, dim, padding) for part in (low, high)], dim=1)
    signal = functional.conv_transpose2d(stacked, kernel, stride=(2, 1) if dim == -2 else (1, 2)).squeeze(1)
    signal = signal.narrow(dim, 2 * padding + length // 2 - 1, 2 * low.shape[dim])
    return signal.reshape(*low.shape[:-2], *signal.shape[-2:])


def _kernel(wavelet: str, dim: int, like: Tensor) -> Tensor:
    """The filters as the weights of a convolution along ``dim``: [2, 1, L, 1] or [2, 1, 1, L]."""
    return taps(wavelet).to(like)[:, None].unsqueeze(-1 if dim == -2 else -2)


def _periodic(x: Tensor, dim: int, padding: int) -> Tensor:
    """[..., H, W] → [n, H', W'], with ``padding`` samples of periodic padding at both ends of ``dim``."""
    length = x.shape[dim]
    index = torch.arange(-padding, length + padding, device=x.device) % length
    return x.reshape(-1, *x.shape[-2:]).index_select(dim, index)
