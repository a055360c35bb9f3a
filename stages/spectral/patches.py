"""Conversion between bands and patches, with or without overlap: one row of numbers per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def to_patches(band: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, (H/p)(W/p), C·p·p], in raster order. Raises ValueError if p does not divide a side."""
    _check_sides(band, patch)
    batch, channels, height, width = band.shape
    rows, columns = height // patch, width // patch
    blocks = band.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, rows * columns, channels * patch * patch)


def from_patches(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of ``to_patches``: [B, rows·columns, C·p·p] → [B, C, rows·p, columns·p]."""
    batch, _, width = patches.shape
    rows, columns = grid
    channels = width // (patch * patch)
    blocks = patches.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, channels, rows * patch, columns * patch)


def to_windows(band: Tensor, patch: int, margin: int) -> Tensor:
    """Patches enlarged by ``margin`` on each side: [B, C, H, W] → [B, (H/p)(W/p), C·n·n], n = p + 2·margin.

    The band is padded by repeating its border values. Raises ValueError if p does not divide a side.
    """
    if not margin:
        return to_patches(band, patch)
    _check_sides(band, patch)
    padded = functional.pad(band, (margin,) * 4, mode="replicate")
    return functional.unfold(padded, patch + 2 * margin, stride=patch).transpose(1, 2)


def from_windows(windows: Tensor, patch: int, margin: int, grid: tuple[int, int]) -> Tensor:
    """Blend overlapping windows: [B, rows·columns, C·n·n] → [B, C, rows·p, columns·p].

    Windows fade out toward their sides, and the weights at each position sum to 1. So constants are preserved, and
    consistent windows, such as those of ``to_windows``, give their band.
    """
    if not margin:
        return from_patches(windows, patch, grid)
    side = patch + 2 * margin
    size = (grid[0] * patch + 2 * margin, grid[1] * patch + 2 * margin)
    steps = torch.arange(side, dtype=windows.dtype, device=windows.device) + 0.5
    rise = (torch.minimum(steps, side - steps) / (2 * margin)).clamp(max=1)
    weight = (rise[:, None] * rise).flatten()
    weighted = windows.unflatten(-1, (-1, side * side)) * weight
    summed = functional.fold(weighted.flatten(-2).transpose(1, 2), size, side, stride=patch)
    total = functional.fold(weight[None, :, None].expand(1, -1, grid[0] * grid[1]), size, side, stride=patch)
    return (summed / total)[..., margin:-margin, margin:-margin]


def _check_sides(band: Tensor, patch: int) -> None:
    height, width = band.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"a band of {height}x{width} cannot be cut into patches of {patch}")
