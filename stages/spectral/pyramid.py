"""Levels of a 2-D wavelet transform with any filters: each level splits the approximation of the previous one.

- Odd sides are padded by repeating the last row or column, as in PyWavelets' periodization, so bands have
  ``ceil(side / 2)`` rows. The inverse needs the original side to crop the result.
- Everything is computed in float32 or float64; half precision is converted to float32.
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
    """Convert to float32, unless the tensor is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def even_sides(x: Tensor) -> Tensor:
    """Pad odd sides of [..., H, W] by repeating the last row and column."""
    height, width = x.shape[-2:]
    if not (height % 2 or width % 2):
        return x
    flat = functional.pad(x.reshape(-1, 1, height, width), (0, width % 2, 0, height % 2), mode="replicate")
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])


def decompose(x: Tensor, levels: int, step: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """[..., C, H, W] → [approximation, coarsest details, …, finest details], by applying ``step`` ``levels`` times.

    Raises ValueError if ``levels`` is negative or too large for the image.
    """
    if levels < 0:
        raise ValueError(f"levels={levels}; allowed: 0 or more")
    details: list[Tensor] = []
    approximation = lift_dtype(x)
    for level in range(levels):
        if max(approximation.shape[-2:]) < 2:
            raise ValueError(f"levels={levels}; allowed for an image of {tuple(x.shape[-2:])} pixels: at most {level}")
        approximation, detail = step(approximation)
        details.append(detail)
    return [approximation, *reversed(details)]


def compose(
    bands: Sequence[Tensor], unstep: Callable[[Tensor, Tensor, Size | None], Tensor], size: Size | None
) -> Tensor:
    """The inverse of ``decompose``. ``size`` is (height, width) of the image, needed if a side was odd at any level."""
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
