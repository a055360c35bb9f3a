"""Multi-level 2-D wavelet transforms by name, for any batch shape and channels, with autograd.

- Names are those of PyWavelets: ``haar`` (``haar.py``); ``bior2.2`` and ``bior4.4``, which are LeGall 5/3 and CDF 9/7
  (``lifting.py``); and all orthogonal wavelets, such as ``db2``, ``sym4`` or ``coif1`` (``filters.py``).
- There are two scalings. ``orthonormal`` is that of PyWavelets. With ``averaging`` the low-pass filter has sum 1, so
  the approximation is a downsampled image in about the pixel range (filters with negative taps overshoot at edges).
- Subbands have the order and sign of PyWavelets. Sides may be odd, as for Haar.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from data.errors import InputError
from stages.spectral import filters, lifting
from stages.spectral.haar import haar_step, haar_unstep
from stages.spectral.lifting import Boundary
from stages.spectral.names import HAAR, LIFTED, WAVELETS, is_wavelet
from stages.spectral.pyramid import Scaling, Size, compose, decompose, even_sides, lift_dtype


def check_wavelet(name: str, boundary: Boundary | None = None) -> None:
    """Raise InputError for an unknown wavelet, or a boundary that it does not support."""
    if not is_wavelet(name):
        raise InputError(f"the wavelet {name!r}; allowed: {WAVELETS}")
    if boundary == "symmetric" and name not in LIFTED:
        raise InputError(f"symmetric borders with the wavelet {name}; only {', '.join(LIFTED)} support them")


def dwt(
    x: Tensor, levels: int, wavelet: str, scaling: Scaling = "orthonormal", boundary: Boundary | None = None
) -> list[Tensor]:
    """Multi-level analysis of [..., C, H, W]: [approximation, coarsest details [..., 3, C, h, w], …, finest details].

    ``boundary`` None is symmetric for bior2.2 and bior4.4, periodization for orthogonal wavelets. Raises ValueError for
    an unknown wavelet, an unsupported boundary, and ``levels`` that are negative or too large for the image.
    """
    check_wavelet(wavelet, boundary)
    if wavelet in HAAR:
        return decompose(x, levels, partial(haar_step, scaling=scaling))
    return decompose(x, levels, partial(_step, wavelet=wavelet, scaling=scaling, boundary=boundary))


def idwt(
    bands: Sequence[Tensor],
    wavelet: str,
    scaling: Scaling = "orthonormal",
    size: Size | None = None,
    boundary: Boundary | None = None,
) -> Tensor:
    """The inverse of ``dwt``. ``size`` is (height, width) of the image, needed if a side was odd at any level."""
    check_wavelet(wavelet, boundary)
    if wavelet in HAAR:
        return compose(bands, lambda low, details, target: haar_unstep(low, details, scaling, target), size)
    return compose(bands, partial(_unstep, wavelet=wavelet, scaling=scaling, boundary=boundary), size)


def _split(x: Tensor, dim: int, wavelet: str, scaling: Scaling, boundary: Boundary | None) -> tuple[Tensor, Tensor]:
    if wavelet in LIFTED:
        return lifting.split(x, dim, wavelet, scaling, boundary or "symmetric")
    return filters.split(x, dim, wavelet, scaling)


def _join(low: Tensor, high: Tensor, dim: int, wavelet: str, scaling: Scaling, boundary: Boundary | None) -> Tensor:
    if wavelet in LIFTED:
        return lifting.join(low, high, dim, wavelet, scaling, boundary or "symmetric")
    return filters.join(low, high, dim, wavelet, scaling)


def _step(x: Tensor, wavelet: str, scaling: Scaling, boundary: Boundary | None) -> tuple[Tensor, Tensor]:
    """One level: [..., C, H, W] → approximation [..., C, h, w] and details [..., 3, C, h, w] (cH, cV, cD)."""
    low, high = _split(even_sides(x), -2, wavelet, scaling, boundary)
    approximation, vertical = _split(low, -1, wavelet, scaling, boundary)
    horizontal, diagonal = _split(high, -1, wavelet, scaling, boundary)
    return approximation, torch.stack((horizontal, vertical, diagonal), dim=-4)


def _unstep(
    approximation: Tensor, details: Tensor, size: Size | None, wavelet: str, scaling: Scaling, boundary: Boundary | None
) -> Tensor:
    """The inverse of ``_step``."""
    horizontal, vertical, diagonal = lift_dtype(details).unbind(dim=-4)
    low = _join(lift_dtype(approximation), vertical, -1, wavelet, scaling, boundary)
    high = _join(horizontal, diagonal, -1, wavelet, scaling, boundary)
    x = _join(low, high, -2, wavelet, scaling, boundary)
    return x if size is None else x[..., : size[0], : size[1]]
