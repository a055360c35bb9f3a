"""Convert the known part of a list to an image of patches for an encoder.

The coefficients of a patch (all channels of all planes at some neighboring blocks) are concatenated, so chroma at half
resolution needs no padding: a patch of 2x2 luma blocks has one block of each chroma plane.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import Tokens
from stages.lists import ListGrammar


class DenseImage(nn.Module):
    """Look-up tables from an element's channel and position to its patch and its place in the patch.

    ``patch`` is the side of a patch in blocks of plane 0. Raises ValueError if it cuts a block of another plane.
    """

    slot_of: Tensor
    patch_of: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, grammar: ListGrammar, patch: int) -> None:
        super().__init__()
        height, width = grammar.grids[0]
        factors = [(height // rows, width // columns) for rows, columns in grammar.grids]
        if patch < 1 or any(patch % factor for pair in factors for factor in pair):
            least = max(factor for pair in factors for factor in pair)
            raise InputError(f"prior.patch={patch}; allowed: multiples of {least}, as all planes share the patches")
        self.grid = (-(-height // patch), -(-width // patch))
        """(rows, columns) of patches."""
        shape = (grammar.end + 1, grammar.num_positions)
        tables = {name: torch.zeros(shape, dtype=torch.int64) for name in ("inside", "patch", "row", "column")}
        first = 0
        for channel in range(grammar.end):
            plane = int(grammar.plane_of[channel])
            (rows, columns), (down, right) = grammar.grids[plane], factors[plane]
            positions = torch.arange(rows * columns)
            row, column = positions // columns * down, positions % columns * right
            table_values = {
                "row": row,
                "column": column,
                "patch": row // patch * self.grid[1] + column // patch,
                "inside": first + row % patch // down * (patch // right) + column % patch // right,
            }
            for name, values in table_values.items():
                tables[name][channel, : len(positions)] = values
            first += (patch // down) * (patch // right)
        self.width = first
        """Coefficients per patch."""
        tables["slot"] = tables["patch"] * first + tables.pop("inside")
        tables["slot"][grammar.end] = self.num_patches * first  # the end element has no place
        for name, table in tables.items():
            self.register_buffer(f"{name}_of", table, persistent=False)
        self.largest = grammar.largest

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    def forward(self, tokens: Tokens) -> Tensor:
        """Quantized values float32 [B, patches, width] of lists or parts of lists; 0 where there is no element."""
        ids, nowhere = tokens.ids, self.num_patches * self.width
        slots = self.slot_of[ids[..., 0], ids[..., 1]].masked_fill(~tokens.counted, nowhere)
        image = torch.zeros(len(ids), nowhere + 1, device=ids.device)
        image.scatter_(1, slots, (ids[..., 2] - self.largest).float())
        return image[:, :-1].view(len(ids), self.num_patches, self.width)
