"""Multi-level 2-D wavelets by PyWavelets as one nested matrix, the coarser levels in its upper left corner.

A level's bands high along y, high along x and high along both lie below, right and diagonally of what is coarser.
"""

from __future__ import annotations

import numpy as np
import pywt


def levels_of(side: int) -> int:
    """Wavelet levels of an image: down to a scaling block of 2x2. Raises ValueError for sides that do not fit."""
    if side < 4 or side & (side - 1):
        below = 4
        while below * 2 < side:
            below *= 2
        raise ValueError(f"a side of {side} pixels; allowed: powers of two from 4, e.g. {below} or {below * 2}")
    return side.bit_length() - 2


def nested_dwt(pixels: np.ndarray, wavelet: str) -> np.ndarray:
    """Nested matrices float64 [N, C, S, S] of images [N, C, S, S]: periodised, down to a scaling block of 2x2."""
    matrix = np.array(pixels, np.float64)
    size = matrix.shape[-1]
    for _ in range(levels_of(size)):
        half = size // 2
        part = matrix[..., :size, :size]
        low, (high_y, high_x, high_both) = pywt.dwt2(part, wavelet, mode="periodization", axes=(-2, -1))
        part[..., :half, :half], part[..., half:, :half] = low, high_y
        part[..., :half, half:], part[..., half:, half:] = high_x, high_both
        size = half
    return matrix


def nested_idwt(matrix: np.ndarray, wavelet: str) -> np.ndarray:
    """The inverse of ``nested_dwt``: images float64 [N, C, S, S]."""
    matrix = matrix.copy()
    size = 2
    while size < matrix.shape[-1]:
        part = matrix[..., : 2 * size, : 2 * size]
        bands = (part[..., size:, :size], part[..., :size, size:], part[..., size:, size:])
        part[...] = pywt.idwt2((part[..., :size, :size], bands), wavelet, mode="periodization", axes=(-2, -1))
        size *= 2
    return matrix


def largest_coefficient(side: int, wavelet: str) -> float:
    """A bound of the coefficients' size for pixels of at most 1."""
    line = np.eye(side)
    bound, gain = 0.0, line
    for _ in range(levels_of(side)):
        low, high = pywt.dwt(gain, wavelet, mode="periodization", axis=0)
        norms = [float(np.abs(part).sum(axis=1).max()) for part in (low, high)]
        bound = max(bound, norms[0] * norms[1], norms[1] ** 2, norms[0] ** 2)
        gain = low
    return bound
