"""Multi-level 2-D Haar wavelets by additions and reshapes, for any batch, any channels and autograd.

What is notable here:

- two scalings: ``orthonormal`` keeps energy and equals ``pywt.wavedec2(x, "haar", mode="periodization")``; with
  ``averaging`` the approximation is the box-reduced image itself, in pixel range, which is what many resolutions need;
- subbands have PyWavelets' order and sign: cH (low along x, high along y), cV (high along x, low along y), cD;
- an odd side is lengthened by repeating its last row or column, as PyWavelets' periodization does, so the band has
  ``ceil(side / 2)`` rows; ``inverse`` needs the true side to cut it off again;
- everything is computed in float32 or float64; halves are lifted to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Scaling = Literal["orthonormal", "averaging"]


def _lift(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def butterfly(first: Tensor, second: Tensor, halved: bool) -> tuple[Tensor, Tensor]:
    """Sum and difference of two tensors, or the halves of these, in two passes over memory."""
    if not halved:
        return first + second, first - second
    mean = torch.lerp(first, second, 0.5)
    return mean, mean - second


def haar_step(x: Tensor, scaling: Scaling = "orthonormal") -> tuple[Tensor, Tensor]:
    """One analysis level: [..., C, H, W] → approximation [..., C, h, w] and details [..., 3, C, h, w] (cH, cV, cD)."""
    x = _lift(x)
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        flat = x.reshape(-1, 1, height, width)
        flat = functional.pad(flat, (0, width % 2, 0, height % 2), mode="replicate")
        x = flat.reshape(*x.shape[:-2], *flat.shape[-2:])
    low, high = butterfly(x[..., 0::2, :], x[..., 1::2, :], halved=True)
    halved = scaling == "averaging"
    approximation, vertical = butterfly(low[..., 0::2], low[..., 1::2], halved)
    horizontal, diagonal = butterfly(high[..., 0::2], high[..., 1::2], halved)
    return approximation, torch.stack((horizontal, vertical, diagonal), dim=-4)


def haar_unstep(
    approximation: Tensor, details: Tensor, scaling: Scaling = "orthonormal", size: tuple[int, int] | None = None
) -> Tensor:
    """The inverse of ``haar_step``: [..., C, H, W], cut to ``size`` (height, width) where a side was odd."""
    approximation, details = _lift(approximation), _lift(details)
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

    Raises ValueError when ``levels`` is negative or halves a side of one pixel.
    """
    if levels < 0:
        raise ValueError(f"levels={levels}; allowed: 0 or more")
    details: list[Tensor] = []
    approximation = _lift(x)
    for level in range(levels):
        if max(approximation.shape[-2:]) < 2:
            raise ValueError(f"levels={levels}; an image of {tuple(x.shape[-2:])} pixels has at most {level}")
        approximation, detail = haar_step(approximation, scaling)
        details.append(detail)
    return [approximation, *reversed(details)]


def haar_idwt(bands: Sequence[Tensor], scaling: Scaling = "orthonormal", size: tuple[int, int] | None = None) -> Tensor:
    """The inverse of ``haar_dwt``. ``size`` is the image's (height, width), needed where a side was odd on the way."""
    sizes: list[tuple[int, int] | None] = [None] * (len(bands) - 1)
    if size is not None:
        current = size
        for index in range(len(bands) - 2, -1, -1):
            sizes[index] = current
            current = ((current[0] + 1) // 2, (current[1] + 1) // 2)
    x = bands[0]
    for detail, target in zip(bands[1:], sizes, strict=True):
        x = haar_unstep(x, detail, scaling, target)
    return x
