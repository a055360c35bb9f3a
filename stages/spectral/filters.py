"""Any orthogonal wavelet of PyWavelets through its taps: periodised convolution, there and back.

Coefficients are those of ``pywt.dwt(…, mode="periodization")``. The inverse is the transpose, so it needs no filters of
its own. Signals may be shorter than the filter, which then goes around several times.
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
    """float64 [2, L]: low-pass and high-pass filter, from the last tap to the first, as a correlation wants them."""
    found = pywt.Wavelet(wavelet)
    # on the CPU also where a network is built on the meta device: the cache is for everybody
    return torch.tensor([found.dec_lo, found.dec_hi], dtype=torch.float64, device="cpu").flip(1)


def split(x: Tensor, dim: int, wavelet: str, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Low-pass and high-pass halves of an even number of samples along ``dim``, -2 or -1."""
    kernel = _kernel(wavelet, dim, x) * (1 if scaling == "orthonormal" else math.sqrt(0.5))
    around = taps(wavelet).shape[1] // 2 - 1
    flat = _periodic(x, dim, around).unsqueeze(1)
    found = functional.conv2d(flat, kernel, stride=(2, 1) if dim == -2 else (1, 2))
    low, high = (part.reshape(*x.shape[:-2], *part.shape[-2:]) for part in found.unbind(1))
    return low, high


def join(low: Tensor, high: Tensor, dim: int, wavelet: str, scaling: Scaling) -> Tensor:
    """The inverse of ``split``."""
    kernel = _kernel(wavelet, dim, low) * (1 if scaling == "orthonormal" else math.sqrt(2))
    length = taps(wavelet).shape[1]
    around = length // 4
    flat = torch.stack([_periodic(part, dim, around) for part in (low, high)], dim=1)
    found = functional.conv_transpose2d(flat, kernel, stride=(2, 1) if dim == -2 else (1, 2)).squeeze(1)
    found = found.narrow(dim, 2 * around + length // 2 - 1, 2 * low.shape[dim])
    return found.reshape(*low.shape[:-2], *found.shape[-2:])


def _kernel(wavelet: str, dim: int, like: Tensor) -> Tensor:
    """The filters as the weights of a convolution along ``dim``: [2, 1, L, 1] or [2, 1, 1, L]."""
    return taps(wavelet).to(like)[:, None].unsqueeze(-1 if dim == -2 else -2)


def _periodic(x: Tensor, dim: int, around: int) -> Tensor:
    """[..., H, W] → [n, H', W'] with ``around`` samples of its periodic continuation on both ends of ``dim``."""
    length = x.shape[dim]
    index = torch.arange(-around, length + around, device=x.device) % length
    return x.reshape(-1, *x.shape[-2:]).index_select(dim, index)
