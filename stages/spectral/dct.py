"""Discrete cosine transform (DCT-II, orthonormal) of square blocks and whole images, and orders of frequencies."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


@lru_cache
def dct_matrix(size: int) -> Tensor:
    """float64 [size, size] with cosines as rows, from low to high frequency. The inverse is the transpose."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * places[:, None] * (places + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def block_dct(x: Tensor, block: int) -> Tensor:
    """Coefficients [..., block², H/block, W/block] of float64 images [..., H, W]; frequency (u, v) is u · block + v.

    ``u`` is the vertical and ``v`` the horizontal frequency in half waves. Raises RuntimeError if ``block`` does not
    divide a side.
    """
    matrix = dct_matrix(block).to(x.device)
    rows, columns = x.shape[-2] // block, x.shape[-1] // block
    blocks = x.reshape(*x.shape[:-2], rows, block, columns, block).transpose(-3, -2)
    coefficients = matrix @ blocks @ matrix.T
    return coefficients.flatten(-2).movedim(-1, -3)


def block_idct(coefficients: Tensor, block: int) -> Tensor:
    """The inverse of ``block_dct``."""
    matrix = dct_matrix(block).to(coefficients.device)
    blocks = matrix.T @ coefficients.movedim(-3, -1).unflatten(-1, (block, block)) @ matrix
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def lowpass(pixels: Tensor, widths: Tensor) -> Tensor:
    """Keep only the ``widths`` int64 [B] lowest DCT frequencies of each axis of images [B, C, H, W].

    Returns float32. If the width is the longer side or more, the image is returned unchanged, bit for bit (SpectralAR,
    arXiv 2506.10962).
    """
    pixels = pixels.float()
    height, width = pixels.shape[-2:]
    rows, columns = (dct_matrix(side).to(pixels) for side in (height, width))
    widths = widths.to(pixels.device)
    kept = [(torch.arange(side, device=pixels.device) < widths[:, None]).to(pixels) for side in (height, width)]
    coefficients = rows @ pixels @ columns.T * (kept[0][:, None, :, None] * kept[1][:, None, None, :])
    return torch.where((widths >= max(height, width))[:, None, None, None], pixels, rows.T @ coefficients @ columns)


@lru_cache
def zigzag(block: int) -> tuple[int, ...]:
    """Frequencies u · block + v in the zigzag order of JPEG: by diagonals, alternating up and down."""

    def rank(frequency: int) -> tuple[int, int]:
        u, v = divmod(frequency, block)
        return u + v, u if (u + v) % 2 else v

    return tuple(sorted(range(block * block), key=rank))


def shell(frequency: int, block: int) -> int:
    """Octave of a frequency: 0 for the mean, k for those in a block of side 2^k but not in a block of half that side.

    The shells up to k are the DCT of the block downsampled to side 2^k.
    """
    return max(divmod(frequency, block)).bit_length()


@lru_cache
def frequencies_by_shell(block: int) -> tuple[int, ...]:
    """Frequencies by octave, inside an octave in the zigzag order of JPEG."""
    return tuple(sorted(zigzag(block), key=lambda frequency: shell(frequency, block)))  # sorted() is stable


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of images [B, C, H, W] until ``multiple`` divides both sides, as in JPEG."""
    down, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not (down or right):
        return x
    return functional.pad(x, (0, right, 0, down), mode="replicate")
