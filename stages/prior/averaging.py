"""Moving averages between the prior's layers, over windows of several lengths.

After WaveletGPT (Verma, arXiv 2409.12924). Between layers, half of the features stay unchanged. Each other feature
becomes the causal average over a window whose length is a power of two and depends only on the feature's index: the
low-pass branch of an undecimated Haar pyramid. Design notes:

- a window is truncated at the start of the sequence (or scale), and its sum is divided by the number of slots it holds,
  so a constant input stays constant. The paper does not specify this;
- for image tokens, windows can stop at the borders of scales or be squares in a scale's grid;
- with float32 cumulative sums, a box of any length takes two lookups (four in a grid), in the full pass and in
  step-by-step sampling; learned windows cost time proportional to their length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from data.layout import TokenLayout
from stages.prior.config import AVERAGING, AVERAGING_BORDERS

MIXED = 0.2
"""Weight of the average for ``averaging=mix``, as in replications."""


@dataclass(frozen=True)
class Segment:
    """Consecutive slots, in raster order, that share averaging windows; no window crosses a segment border."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """Index one past the last slot."""
        return self.start + self.rows * self.columns


def segments_of(layout: TokenLayout, num_states: int, length: int, borders: str) -> list[Segment]:
    """Segments of ``num_states`` + ``length`` - 1 slots; the slot that predicts an element belongs to its scale.

    Raises ValueError for borders that the layout does not support.
    """
    if borders not in AVERAGING_BORDERS:
        raise InputError(f"prior.averaging_borders={borders!r}; allowed: {', '.join(AVERAGING_BORDERS)}")
    if borders == "sample":
        return [Segment(0, 1, num_states + length - 1)]
    if layout.ends != "fixed":
        raise InputError(f"prior.averaging_borders={borders}: scales of streams have no fixed place; allowed: sample")
    first = num_states - 1
    segments = [Segment(0, 1, first)] if first else []
    for scale, stop in zip(layout.scales, layout.ends_of_scales, strict=True):
        if borders == "grid" and scale.grid is None:
            raise InputError(
                f"prior.averaging_borders=grid: the scale {scale.name} has no grid; allowed: sample, scale"
            )
        rows, columns = scale.grid if borders == "grid" and scale.grid is not None else (1, scale.length)
        segments.append(Segment(first + stop - scale.length, rows, columns))
    return segments


class MovingAverages(nn.Module):
    """Moving averages between two layers, applied to [B, slots, width].

    ``longest`` is the longest window, in slots or grid cells per side; 0: the length of the longest segment.
    Raises ValueError for windows longer than the longest segment.
    """

    before: Tensor
    beside: Tensor
    counts: Tensor

    def __init__(self, kind: str, width: int, segments: list[Segment], longest: int = 0) -> None:
        super().__init__()
        if kind not in AVERAGING[1:]:
            raise InputError(f"prior.averaging={kind!r}; allowed: {', '.join(AVERAGING)}")
        reach = max(max(segment.rows, segment.columns) for segment in segments)
        if longest > reach or longest < 0 or longest == 1:
            raise InputError(
                f"prior.averaging_longest={longest}; allowed: 2 to {reach} (the longest segment), or 0 for the longest"
            )
        self.grids = any(segment.rows > 1 for segment in segments)
        if kind == "learned" and self.grids:
            raise InputError(
                "prior.averaging=learned has windows of one dimension; set prior.averaging_borders=scale or sample"
            )
        self.kind, self.kept, self.segments = kind, width - width // 2, segments
        self.size = segments[-1].stop
        levels = max(1, int(math.log2(longest or reach)))
        half = width // 2
        self.windows = [2 ** (level + 1) for level in range(levels)]
        level_of = [levels * coordinate // half for coordinate in range(half)]
        self.groups = [level_of.count(level) for level in range(levels)]
        tables = [self._table(window) for window in (1, *self.windows)]
        # indices into cumulative sums with a leading zero row: the sum before the window and, in grids, those beside it
        self.register_buffer("before", torch.stack([table[0] for table in tables]), persistent=False)
        self.register_buffer("beside", torch.stack([table[1] for table in tables]), persistent=False)
        self.register_buffer("counts", torch.stack([table[2] for table in tables]), persistent=False)
        self.kernels = nn.ParameterList(
            [nn.Parameter(torch.full((window,), 1 / window)) for window in self.windows] if kind == "learned" else []
        )

    def _table(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tables of one window length: (before int64 [slots], beside int64 [slots, 2], count float32 [slots])."""
        before, beside, counts = [], [], []
        for segment in self.segments:
            row = torch.arange(segment.rows)[:, None].expand(segment.rows, segment.columns)
            column = torch.arange(segment.columns).expand(segment.rows, -1)
            left = torch.where(column >= window, segment.start + row * segment.columns + column - window + 1, 0)
            has_row_above = row >= window
            up = torch.where(has_row_above, segment.start + (row - window) * segment.columns + column + 1, 0)
            corner = torch.where(has_row_above & (column >= window), up - window, 0)
            height = (row + 1).clamp(max=window) if segment.rows > 1 else torch.ones_like(row)
            before.append(left.flatten())
            beside.append(torch.stack([up, corner], dim=-1).flatten(0, 1))
            counts.append((height * (column + 1).clamp(max=window)).flatten())
        return torch.cat(before), torch.cat(beside), torch.cat(counts).float()

    def room(self, batch: int, size: int, device: torch.device) -> Tensor:
        """Zero-initialized state for ``size`` slots of step-by-step sampling: float32 [B, 1 + size, width / 2]."""
        return torch.zeros(batch, 1 + size, sum(self.groups), device=device)

    def forward(self, x: Tensor, room: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """[B, n, D] → [B, n, D] for the first n slots.

        With ``room``, ``slots`` [n] are either the first n slots or a single later slot; ``room`` holds the state of
        the earlier slots and is updated in place.
        """
        kept, averaged_part = x[..., : self.kept], x[..., self.kept :].float()
        with torch.autocast(x.device.type, enabled=False):
            averages = (
                self._next(averaged_part, room, slots)
                if room is not None and x.shape[1] == 1
                else self._all(averaged_part, room)
            )
        changed = (1 - MIXED) * averaged_part + MIXED * averages if self.kind == "mix" else averages
        return torch.cat([kept, changed.to(x.dtype)], dim=-1)

    def _all(self, x: Tensor, room: Tensor | None) -> Tensor:
        """Averages [B, n, C] at the first n slots, for inputs x [B, n, C]."""
        state = functional.pad(x if self.kind == "learned" else self._sums(x), (0, 0, 1, 0))
        if room is not None:
            room[:, : state.shape[1]] = state
        at = torch.arange(x.shape[1], device=x.device)
        return self._convolved(x) if self.kind == "learned" else self._boxes(state, at)

    def _next(self, x: Tensor, room: Tensor, slots: Tensor | None) -> Tensor:
        """Average at a single slot, for input x [B, 1, C]; ``room`` holds the state of the earlier slots."""
        assert slots is not None
        state = x if self.kind == "learned" else x + self._around(room, slots, 0)
        room.index_copy_(1, slots + 1, state)
        return self._weighted(room, slots) if self.kind == "learned" else self._boxes(room, slots)

    def _sums(self, x: Tensor) -> Tensor:
        """Cumulative sums from each segment's start (its upper left corner): float32 [B, n, C]."""
        parts = []
        for segment in self.segments:
            part = x[:, segment.start : segment.stop]
            missing = segment.rows * segment.columns - part.shape[1]
            grid = functional.pad(part, (0, 0, 0, missing)).unflatten(1, (segment.rows, segment.columns))
            parts.append(grid.cumsum(2).cumsum(1).flatten(1, 2)[:, : part.shape[1]])
            if segment.stop >= x.shape[1]:
                break
        return torch.cat(parts, dim=1)

    def _around(self, sums: Tensor, at: Tensor, table: int) -> Tensor:
        """Part [B, n, C] of ``sums`` [B, 1 + slots, C] that lies outside the windows ending at slots ``at`` [n]."""
        before = sums[:, self.before[table, at]]
        if not self.grids:
            return before
        up, corner = self.beside[table, at].unbind(-1)
        return before + sums[:, up] - sums[:, corner]

    def _boxes(self, sums: Tensor, at: Tensor) -> Tensor:
        parts = []
        for table, part in enumerate(sums.split(self.groups, dim=-1), 1):
            inside = part[:, at + 1] - self._around(part, at, table)
            parts.append(inside / self.counts[table, at, None])
        return torch.cat(parts, dim=-1)

    def _kernel(self, level: int) -> Tensor:
        """Window weights float32 [window], newest slot first; callers divide by the number of slots in the window."""
        return self.kernels[level].float() * self.windows[level]

    def _convolved(self, x: Tensor) -> Tensor:
        """Weighted averages [B, n, C] at the first n slots, for inputs x [B, n, C]."""
        parts = []
        for segment in self.segments:
            part = x[:, segment.start : segment.stop].transpose(1, 2)
            convolved = []
            for level, group in enumerate(part.split(self.groups, dim=1)):
                padded = functional.pad(group.flatten(0, 1).unsqueeze(1), (self.windows[level] - 1, 0))
                kernel = self._kernel(level).flip(0)[None, None]
                convolved.append(functional.conv1d(padded, kernel).view_as(group))
            parts.append(torch.cat(convolved, dim=1).transpose(1, 2))
            if segment.stop >= x.shape[1]:
                break
        counts = self.counts[1:, : x.shape[1]].repeat_interleave(torch.tensor(self.groups, device=x.device), dim=0)
        return torch.cat(parts, dim=1) / counts.T

    def _weighted(self, values: Tensor, at: Tensor) -> Tensor:
        """Weighted averages [B, n, C] at slots ``at`` [n]; ``values`` [B, 1 + slots, C] start with a row of zeros."""
        parts = []
        for level, part in enumerate(values.split(self.groups, dim=-1)):
            count = self.counts[1 + level, at, None]
            back = torch.arange(self.windows[level], device=at.device)
            places = torch.where(back < count, at[:, None] + 1 - back, 0)
            parts.append((part[:, places] * self._kernel(level)[:, None]).sum(2) / count)
        return torch.cat(parts, dim=-1)
