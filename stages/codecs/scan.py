"""The order in which wavelet coefficients are scanned, and who is whose neighbour: tables made once for an image size.

The nested matrix of coefficients is cut into blocks of 4x4, these into groups of 2x2. Coarse levels come first, in
each the bands high along y, high along x, high along both; the four 2x2 bands of the coarsest level share one block.
The blocks of the colour planes at one place follow one another. So sixteen consecutive coefficients are a block, four a
group, and the four children of a coefficient (the same place one level finer) are a group, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stages.spectral.nested import levels_of

NEIGHBOURS = ("self", "left", "right", "up", "down", "parent", "next band", "last band", "next plane", "last plane")
"""Columns of ``Scan.neighbours``; bands and colour planes in a circle."""


@dataclass(frozen=True)
class Scan:
    """Tables over the n = channels · side² coefficients in scan order; -1 where there is none."""

    order: np.ndarray
    """int64 [n]: place in the flattened matrices [channels, side, side]."""
    parent: np.ndarray
    """int32 [n]"""
    child: np.ndarray
    """int32 [n]: the first of four children; -1 for scaling coefficients, too."""
    neighbours: np.ndarray
    """int32 [n, 10], as ``NEIGHBOURS`` names them."""
    level: np.ndarray
    """int64 [n]: 0 for the scaling coefficients, then from coarse to fine."""
    band: np.ndarray
    """int64 [n]: 0 scaling, 1 high along y, 2 high along x, 3 both."""
    channel: np.ndarray
    """int64 [n]"""
    place: np.ndarray
    """float32 [n, 2]: middle of the coefficient's area, (row, column) as shares of the image."""


@lru_cache(maxsize=8)
def scan_of(side: int, channels: int) -> Scan:
    """The tables for images [channels, side, side]."""
    levels = levels_of(side)
    level, band = np.zeros((side, side), np.int64), np.zeros((side, side), np.int64)
    for number in range(1, levels + 1):
        half = 2**number
        for which, (rows, columns) in enumerate(((1, 0), (0, 1), (1, 1)), 1):
            part = slice(rows * half, (rows + 1) * half), slice(columns * half, (columns + 1) * half)
            level[part], band[part] = number, which
    # the 2x2 bands of the coarsest level and the scaling block are one block of 4x4
    y, x = np.mgrid[:side, :side]
    corner = (level <= 1).astype(np.int64)
    matrix = np.lexsort(
        [
            part.ravel()
            for part in (
                x % 2,
                y % 2,
                np.where(corner, 0, x // 2 % 2),
                np.where(corner, band, y // 2 % 2),
                x // 4,
                y // 4,
                np.where(corner, 0, band),
                np.maximum(level, 1),
            )
        ]
    )
    blocks = matrix.reshape(-1, 1, 16) + np.arange(channels)[:, None] * side * side
    order = blocks.ravel()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    channel, flat = np.divmod(order, side * side)
    row, column = np.divmod(flat, side)
    level, band = level.ravel()[flat], band.ravel()[flat]
    width = np.where(level > 0, 2**level, 2)
    top, left = (band % 2) * width, (band // 2) * width

    def find(plane: np.ndarray, y: np.ndarray, x: np.ndarray, there: np.ndarray) -> np.ndarray:
        place = plane * side * side + np.where(there, y, 0) * side + np.where(there, x, 0)
        return np.where(there, rank[place], -1).astype(np.int32)

    def beside(down: int, right: int) -> np.ndarray:
        y, x = row - top + down, column - left + right
        return find(channel, row + down, column + right, (y >= 0) & (y < width) & (x >= 0) & (x < width))

    def other_band(step: int) -> np.ndarray:
        which = (band - 1 + step) % 3 + 1
        y, x = row - top + (which % 2) * width, column - left + (which // 2) * width
        return find(channel, y, x, level > 0)

    def other_plane(step: int) -> np.ndarray:
        there = np.full(len(order), abs(step) < channels and not (step < 0 and channels == 2))
        return find((channel + step) % channels, row, column, there)

    parent = find(channel, row // 2, column // 2, level > 1)
    child = find(channel, row * 2, column * 2, (level > 0) & (level < levels))
    neighbours = [
        np.arange(len(order), dtype=np.int32),
        *(beside(*step) for step in ((0, -1), (0, 1), (-1, 0), (1, 0))),
        parent,
        other_band(1),
        other_band(-1),
        other_plane(1),
        other_plane(-1),
    ]
    place = np.stack([(row - top + 0.5) / width, (column - left + 0.5) / width], axis=1)
    return Scan(order, parent, child, np.stack(neighbours, axis=1), level, band, channel, place.astype(np.float32))
