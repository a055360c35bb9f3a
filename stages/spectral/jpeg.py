"""Parts of JPEG (ITU-T T.81) besides the block DCT: quantization tables, quality and chroma subsampling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Annex K of the standard, tables K.1 and K.2
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47),
    (18, 21, 26, 66),
    (24, 26, 56, 99),
    (47, 66, 99, 99),
)


def quantization_table(quality: int, chroma: bool, block: int = 8) -> Tensor:
    """Step of every frequency u · block + v at a quality from 1 to 100: float64 [block²] of integers 1 … 255.

    Tables are scaled as in libjpeg. Blocks other than 8 use the step of the frequency in an 8x8 block at the same
    relative position in the spectrum (the papers that stretch tables do not describe how).
    """
    table = torch.full((8, 8), 99)
    if chroma:
        table[:4, :4] = torch.tensor(_CHROMA)
    else:
        table = torch.tensor(_LUMA)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = ((table * scale + 50) // 100).clamp(1, 255)
    indices = torch.arange(block) * 8 // block
    return table[indices][:, indices].flatten().double()


def halve(x: Tensor) -> Tensor:
    """Downsample integer chroma [..., H, W] by 2 as in libjpeg: means of 2x2, halves alternately rounded down and up.

    Returns integers. Raises RuntimeError for odd sides.
    """
    sums = x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).sum((-3, -1))
    bias = 1 + torch.arange(sums.shape[-1], device=x.device) % 2
    return ((sums + bias) / 4).floor()


def double(x: Tensor, smooth: bool) -> Tensor:
    """Upsample chroma [N, C, H, W] by 2: by repetition, or with libjpeg's triangle filter (3 to 1) if ``smooth``."""
    if not smooth:
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
