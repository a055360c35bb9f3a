"""Multi-level 2-D Haar wavelets by additions and reshapes, for any batch shape and channels, with autograd.

- There are two scalings. ``orthonormal`` preserves energy and equals ``pywt.wavedec2(x, "haar",
  mode="periodization")``. With ``averaging`` the approximation is the image downsampled by averaging, in pixel range,
  as multi-resolution models need it.
- Subbands have the order and sign of PyWavelets: cH (low along x, high along y), cV (high along x, low along y), cD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.spectral.pyramid import Scaling, Size, compose, decompose, even_sides, lift_dtype


def butterfly(first: Tensor, second: Tensor, halved: bool) -> tuple[Tensor, Tensor]:
    """Sum and difference of two tensors, divided by 2 if ``halved``, in two passes over memory."""
    if not halved:
        return first + second, first - second
    mean = torch.lerp(first, second, 0.5)
    return mean, mean - second


def haar_step(x: Tensor, scaling: Scaling = "orthonormal") -> tuple[Tensor, Tensor]:
    """One analysis level: [..., C, H, W] → approximation [..., C, h, w] and details [..., 3, C, h, w] (cH, cV, cD)."""
    x = even_sides(lift_dtype(x))
    low, high = butterfly(x[..., 0::2, :], x[..., 1::2, :], halved=True)
    halved = scaling == "averaging"
    approximation, vertical = butterfly(low[..., 0::2], low[..., 1::2], halved)
    horizontal, diagonal = butterfly(high[..., 0::2], high[..., 1::2], halved)
    return approximation, torch.stack((horizontal, vertical, diagonal), dim=-4)


def haar_unstep(
    approximation: Tensor, details: Tensor, scaling: Scaling = "orthonormal", size: Size | None = None
) -> Tensor:
    """The inverse of ``haar_step``: [..., C, H, W], cropped to ``size`` (height, width) if a side was odd."""
    approximation, details = lift_dtype(approximation), lift_dtype(details)
    horizontal, vertical, diagonal = details.unbind(dim=-4)
    halved = scaling == "orthonormal"
    left, right = butterfly(approximation, vertical, halved)
    left_high, right_high = butterfly(horizontal, diagonal, halved)
    top = torch.stack((left + left_high, right + right_high), dim=-1).flatten(-2)
    bottom = torch.stack((left - left_high, right - right_high), dim=-1).flatten(-2)
    x = torch.stack((top, bottom), dim=-2).flatten(-3, -2)
    return x if size is None else x[..., : size[0], : size[1]]


def haar_dwt(x: Tensor, levels: int, scaling: Scaling = "orthonormal") -> list[Tensor]:
    """Multi-level analysis of [..., C, H, W]: [approximation, coarsest details, …, finest details].

    Raises ValueError if ``levels`` is negative or too large for the image.
    """
    return decompose(x, levels, lambda part: haar_step(part, scaling))


def haar_idwt(bands: Sequence[Tensor], scaling: Scaling = "orthonormal", size: Size | None = None) -> Tensor:
    """The inverse of ``haar_dwt``. ``size`` is (height, width) of the image, needed if a side was odd at any level."""
    return compose(bands, lambda low, details, target: haar_unstep(low, details, scaling, target), size)
