"""Scan order of wavelet coefficients and their neighbors, as tables that are computed once per image size.

The nested matrix of coefficients is divided into blocks of 4x4, and these into groups of 2x2. Coarse levels come first.
In each level the bands are in the order high along y, high along x, high along both; the four 2x2 bands of the coarsest
level share one block. Blocks of the color planes at the same place follow one another. So 16 consecutive coefficients
form a block and 4 form a group, and the four children of a coefficient (the same place one level finer) are also a
group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stages.spectral.nested import levels_of

NEIGHBOURS = ("self", "left", "right", "up", "down", "parent", "next band", "last band", "next plane", "last plane")
"""Columns of ``Scan.neighbours``. Bands and color planes are cyclic."""


@dataclass(frozen=True)
class Scan:
    """Tables for the n = channels · side² coefficients in scan order; -1 for none."""

    order: np.ndarray
    """int64 [n]: index into the flattened matrices [channels, side, side]."""
    parent: np.ndarray
    """int32 [n]: index of the parent."""
    child: np.ndarray
    """int32 [n]: index of the first of four children; -1 also for scaling coefficients."""
    neighbours: np.ndarray
    """int32 [n, 10]: indices of the neighbors ``NEIGHBOURS``."""
    level: np.ndarray
    """int64 [n]: 0 for scaling coefficients, then from coarse to fine."""
    band: np.ndarray
    """int64 [n]: 0 scaling, 1 high along y, 2 high along x, 3 both."""
    channel: np.ndarray
    """int64 [n]: color plane."""
    place: np.ndarray
    """float32 [n, 2]: center of the area of the coefficient, (row, column) as fractions of the image."""


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
    # the 2x2 bands of the coarsest level and the scaling block form one block of 4x4
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

    def find(plane: np.ndarray, y: np.ndarray, x: np.ndarray, exists: np.ndarray) -> np.ndarray:
        index = plane * side * side + np.where(exists, y, 0) * side + np.where(exists, x, 0)
        return np.where(exists, rank[index], -1).astype(np.int32)

    def beside(down: int, right: int) -> np.ndarray:
        y, x = row - top + down, column - left + right
        return find(channel, row + down, column + right, (y >= 0) & (y < width) & (x >= 0) & (x < width))

    def other_band(step: int) -> np.ndarray:
        which = (band - 1 + step) % 3 + 1
        y, x = row - top + (which % 2) * width, column - left + (which // 2) * width
        return find(channel, y, x, level > 0)

    def other_plane(step: int) -> np.ndarray:
        exists = np.full(len(order), abs(step) < channels and not (step < 0 and channels == 2))
        return find((channel + step) % channels, row, column, exists)

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
