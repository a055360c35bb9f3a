"""Levels of a 2-D wavelet transform, whatever the filters: each splits the approximation that the last one left.

What is notable here:

- an odd side is lengthened by repeating its last row or column, as PyWavelets' periodization does, so the band has
  ``ceil(side / 2)`` rows; the inverse needs the true side to cut it off again;
- everything is computed in float32 or float64; halves are lifted to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Scaling = Literal["orthonormal", "averaging"]
Size = tuple[int, int]


def lift_dtype(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def even_sides(x: Tensor) -> Tensor:
    """[..., H, W] whose last row and column are repeated where the side is odd."""
    height, width = x.shape[-2:]
    if not (height % 2 or width % 2):
        return x
    flat = functional.pad(x.reshape(-1, 1, height, width), (0, width % 2, 0, height % 2), mode="replicate")
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def decompose(x: Tensor, levels: int, step: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """[..., C, H, W] → [approximation, coarsest details, …, finest details] by ``levels`` times ``step``.

    Raises ValueError when ``levels`` is negative or halves a side of one pixel.
    """
    if levels < 0:
        raise ValueError(f"levels={levels}; allowed: 0 or more")
    details: list[Tensor] = []
    approximation = lift_dtype(x)
    for level in range(levels):
        if max(approximation.shape[-2:]) < 2:
            raise ValueError(f"levels={levels}; an image of {tuple(x.shape[-2:])} pixels has at most {level}")
        approximation, detail = step(approximation)
        details.append(detail)
    return [approximation, *reversed(details)]


def compose(
    bands: Sequence[Tensor], unstep: Callable[[Tensor, Tensor, Size | None], Tensor], size: Size | None
) -> Tensor:
    """The inverse of ``decompose``. ``size`` is the image's (height, width), needed where a side was odd on the way."""
    sizes: list[Size | None] = [None] * (len(bands) - 1)
    if size is not None:
        current = size
        for index in range(len(bands) - 2, -1, -1):
            sizes[index] = current
            current = ((current[0] + 1) // 2, (current[1] + 1) // 2)
    x = bands[0]
    for detail, target in zip(bands[1:], sizes, strict=True):
        x = unstep(x, detail, target)
    return x
