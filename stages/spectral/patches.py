"""Bands ↔ patches: one row of numbers per token."""

from __future__ import annotations

from torch import Tensor


def to_patches(band: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, (H/p)(W/p), C·p·p], in raster order. Raises ValueError when p does not divide a side."""
    batch, channels, height, width = band.shape
    if height % patch or width % patch:
        raise ValueError(f"a band of {height}x{width} cannot be cut into patches of {patch}")
    rows, columns = height // patch, width // patch
    cut = band.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, rows * columns, channels * patch * patch)


def from_patches(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``to_patches``: [B, rows·columns, C·p·p] → [B, C, rows·p, columns·p]."""
    batch, _, width = patches.shape
    rows, columns = grid
    channels = width // (patch * patch)
    cut = patches.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, rows * patch, columns * patch)
