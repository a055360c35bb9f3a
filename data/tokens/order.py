"""The fixed order in which images are stored in a cache, and random numbers as a function of seed and keys.

This uses its own splitmix64 instead of the generator of a library: NumPy and torch do not guarantee the same
permutation in their next version, but a resumed cache needs the same one.
"""

from __future__ import annotations

import numpy as np

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, BLOCKS_WANTED = 16, 1024, 256


def random_bits(seed: int, *keys: np.ndarray | int) -> np.ndarray:
    """uint64 random numbers, a pure function of the seed and the keys (integers that broadcast together)."""
    state = _mix(np.asarray([seed % 2**64], dtype=np.uint64))
    for key in keys:
        state = _mix(state ^ _mix(np.asarray(key, dtype=np.int64).astype(np.uint64)))
    return state


def source_order(count: int, seed: int) -> np.ndarray:
    """Seeded permutation of ``range(count)``, int64 [count]: the source index at each position of the cache."""
    return np.argsort(random_bits(seed, np.arange(count)), kind="stable").astype(np.int64)


def block_size(count: int) -> int:
    """Samples per block for a split of ``count`` samples. Small datasets still get blocks for all ranks and workers."""
    return min(max(count // BLOCKS_WANTED, MIN_BLOCK_SIZE), MAX_BLOCK_SIZE)


def _mix(values: np.ndarray) -> np.ndarray:
    """One splitmix64 step (Steele, Lea, Flood 2014) on uint64 values. Integer overflow is intended."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
