"""Multi-level 2-D wavelets of PyWavelets as one nested matrix, with coarser levels in the top left corner.

In each level the bands high along y, high along x and high along both are below, right and diagonal of the coarser
levels.
"""

from __future__ import annotations

import numpy as np
import pywt


def levels_of(side: int) -> int:
    """Wavelet levels of an image down to a scaling block of 2x2. Raises ValueError for an invalid side."""
    if side < 4 or side & (side - 1):
        power = 4
        while power * 2 < side:
            power *= 2
        raise ValueError(f"a side of {side} pixels; allowed: powers of two from 4, e.g. {power} or {power * 2}")
    return side.bit_length() - 2


def nested_dwt(pixels: np.ndarray, wavelet: str) -> np.ndarray:
    """Nested matrices float64 [N, C, S, S] of images [N, C, S, S]: periodic borders, down to a scaling block of 2x2."""
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
    """Upper bound for the absolute value of coefficients, for pixels of at most 1."""
    identity = np.eye(side)
    bound, gain = 0.0, identity
    for _ in range(levels_of(side)):
        low, high = pywt.dwt(gain, wavelet, mode="periodization", axis=0)
        norms = [float(np.abs(part).sum(axis=1).max()) for part in (low, high)]
        bound = max(bound, norms[0] * norms[1], norms[1] ** 2, norms[0] ** 2)
        gain = low
    return bound
