"""Moving averages between the prior's layers: half of the coordinates see the past at a resolution of their own.

After WaveletGPT (Verma, arXiv 2409.12924): between layers one half of the coordinates stays, each of the others becomes
the causal average of a window whose length, a power of two, depends on the coordinate alone: the low-pass branch of an
undecimated Haar pyramid. What is notable here:

- a window is cut where the sequence, or a scale, begins, and divided by what it holds. The paper does not say; so a
  constant is a fixed point;
- image tokens are no text: windows may stop at the borders of scales, or be squares of a scale's grid;
- sums of everything so far, in float32, make a box of any length two lookups (four in a grid), in the full pass and for
  one element at a time alike; learned windows cost their length.
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
"""Share of the average where it is mixed in, as replications did."""


@dataclass(frozen=True)
class Segment:
    """Consecutive slots that are averaged among themselves, in raster order."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """The slot behind the last one."""
        return self.start + self.rows * self.columns


def segments_of(layout: TokenLayout, num_states: int, length: int, borders: str) -> list[Segment]:
    """Segments of ``num_states`` + ``length`` - 1 slots; the slot that predicts an element belongs to its scale.

    Raises ValueError for borders that the layout does not have.
    """
    if borders not in AVERAGING_BORDERS:
        raise InputError(f"prior.averaging_borders={borders!r}; allowed: {', '.join(AVERAGING_BORDERS)}")
    if borders == "sample":
        return [Segment(0, 1, num_states + length - 1)]
    if layout.ends != "fixed":
        raise InputError(f"prior.averaging_borders={borders}: scales of streams have no fixed place; allowed: sample")
    first = num_states - 1
    found = [Segment(0, 1, first)] if first else []
    for scale, stop in zip(layout.scales, layout.ends_of_scales, strict=True):
        if borders == "grid" and scale.grid is None:
            raise InputError(
                f"prior.averaging_borders=grid: the scale {scale.name} has no grid; allowed: sample, scale"
            )
        rows, columns = scale.grid if borders == "grid" and scale.grid is not None else (1, scale.length)
        found.append(Segment(first + stop - scale.length, rows, columns))
    return found


class MovingAverages(nn.Module):
    """What happens between two layers to [B, slots, width]. Raises ValueError for windows longer than the sequence.

    ``longest`` is the longest window, in slots or along a grid's side; 0: as long as the longest segment.
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
                f"prior.averaging_longest={longest}; allowed: 2 to {reach}, the longest run, or 0 for that"
            )
        self.grids = any(segment.rows > 1 for segment in segments)
        if kind == "learned" and self.grids:
            raise InputError(
                "prior.averaging=learned has windows of one dimension; set averaging_borders=scale or sample"
            )
        self.kind, self.kept, self.segments = kind, width - width // 2, segments
        self.size = segments[-1].stop
        levels = max(1, int(math.log2(longest or reach)))
        half = width // 2
        self.windows = [2 ** (level + 1) for level in range(levels)]
        level_of = [levels * coordinate // half for coordinate in range(half)]
        self.groups = [level_of.count(level) for level in range(levels)]
        tables = [self._table(window) for window in (1, *self.windows)]
        # lookups into sums that begin with a row of zeros: what lies before the window, and in grids beside it
        self.register_buffer("before", torch.stack([table[0] for table in tables]), persistent=False)
        self.register_buffer("beside", torch.stack([table[1] for table in tables]), persistent=False)
        self.register_buffer("counts", torch.stack([table[2] for table in tables]), persistent=False)
        self.kernels = nn.ParameterList(
            [nn.Parameter(torch.full((window,), 1 / window)) for window in self.windows] if kind == "learned" else []
        )

    def _table(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """(before int64 [slots], beside int64 [slots, 2], count [slots]) for one window."""
        before, beside, counts = [], [], []
        for segment in self.segments:
            row = torch.arange(segment.rows)[:, None].expand(segment.rows, segment.columns)
            column = torch.arange(segment.columns).expand(segment.rows, -1)
            left = torch.where(column >= window, segment.start + row * segment.columns + column - window + 1, 0)
            over = row >= window
            up = torch.where(over, segment.start + (row - window) * segment.columns + column + 1, 0)
            corner = torch.where(over & (column >= window), up - window, 0)
            height = (row + 1).clamp(max=window) if segment.rows > 1 else torch.ones_like(row)
            before.append(left.flatten())
            beside.append(torch.stack([up, corner], dim=-1).flatten(0, 1))
            counts.append((height * (column + 1).clamp(max=window)).flatten())
        return torch.cat(before), torch.cat(beside), torch.cat(counts).float()

    def room(self, batch: int, size: int, device: torch.device) -> Tensor:
        """What must be kept of ``size`` slots to go on from them: float32 [B, 1 + size, width / 2]."""
        return torch.zeros(batch, 1 + size, sum(self.groups), device=device)

    def forward(self, x: Tensor, room: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """[B, n, D] → [B, n, D] of the first n slots; with ``room`` of the ``slots`` [n], the first n or a single one.

        What was before a single one is in ``room``, which is filled.
        """
        kept, given = x[..., : self.kept], x[..., self.kept :].float()
        with torch.autocast(x.device.type, enabled=False):
            averages = (
                self._next(given, room, slots) if room is not None and x.shape[1] == 1 else self._all(given, room)
            )
        changed = (1 - MIXED) * given + MIXED * averages if self.kind == "mix" else averages
        return torch.cat([kept, changed.to(x.dtype)], dim=-1)

    def _all(self, x: Tensor, room: Tensor | None) -> Tensor:
        """Averages of the first slots, x [B, n, C]."""
        state = functional.pad(x if self.kind == "learned" else self._sums(x), (0, 0, 1, 0))
        if room is not None:
            room[:, : state.shape[1]] = state
        at = torch.arange(x.shape[1], device=x.device)
        return self._convolved(x) if self.kind == "learned" else self._boxes(state, at)

    def _next(self, x: Tensor, room: Tensor, slots: Tensor | None) -> Tensor:
        """Averages of a single slot, x [B, 1, C]; what came before it is in ``room``."""
        assert slots is not None
        state = x if self.kind == "learned" else x + self._around(room, slots, 0)
        room.index_copy_(1, slots + 1, state)
        return self._weighted(room, slots) if self.kind == "learned" else self._boxes(room, slots)

    def _sums(self, x: Tensor) -> Tensor:
        """Sums from each segment's beginning (its upper left corner) on: float32 [B, n, C]."""
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
        """What ``sums`` [B, 1 + slots, C] hold before the windows that end at slots ``at`` [n]: [B, n, C]."""
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
        """A window's weights float32 [window] from the newest slot backwards, to be divided by the slots it holds."""
        return self.kernels[level].float() * self.windows[level]

    def _convolved(self, x: Tensor) -> Tensor:
        """Weighted windows of the first slots, x [B, n, C]."""
        parts = []
        for segment in self.segments:
            part = x[:, segment.start : segment.stop].transpose(1, 2)
            found = []
            for level, group in enumerate(part.split(self.groups, dim=1)):
                padded = functional.pad(group.flatten(0, 1).unsqueeze(1), (self.windows[level] - 1, 0))
                kernel = self._kernel(level).flip(0)[None, None]
                found.append(functional.conv1d(padded, kernel).view_as(group))
            parts.append(torch.cat(found, dim=1).transpose(1, 2))
            if segment.stop >= x.shape[1]:
                break
        counts = self.counts[1:, : x.shape[1]].repeat_interleave(torch.tensor(self.groups, device=x.device), dim=0)
        return torch.cat(parts, dim=1) / counts.T

    def _weighted(self, values: Tensor, at: Tensor) -> Tensor:
        """The same of the slots ``at`` [n], from ``values`` [B, 1 + slots, C] that begin with a row of zeros."""
        parts = []
        for level, part in enumerate(values.split(self.groups, dim=-1)):
            count = self.counts[1 + level, at, None]
            back = torch.arange(self.windows[level], device=at.device)
            places = torch.where(back < count, at[:, None] + 1 - back, 0)
            parts.append((part[:, places] * self._kernel(level)[:, None]).sum(2) / count)
        return torch.cat(parts, dim=-1)
