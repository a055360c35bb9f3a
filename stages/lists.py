"""Lists of non-zero coefficients: their grammar and their orders.

A list is a sequence of elements (channel, position, value) and one end element. Coefficients belong to planes (Y, Cb,
Cr). A plane has channels (frequencies), and a channel has one coefficient per position in the plane's grid of blocks.
After *Generating Images with Sparse Representations* (Nash et al., arXiv 2103.03841, section 3).

- Channel ids are numbered in decoding order, so a list in natural order is sorted by (channel, position).
- Everything is computed with tables and comparisons of whole arrays, without loops over a list.
- Another order is another ranking of the channels: lists are sorted by rank, and the grammar compares ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.errors import InputError
from data.layout import Tokens
from stages.grammar import Grammar, GrammarState
from stages.prior.config import LIST_ORDERS


class ListGrammar(Grammar):
    """Lists over ``grids`` (rows, columns) of positions, one per plane, with values from -``largest`` to ``largest``.

    ``planes`` and ``scales`` are the plane and the scale of each channel. The id of a value is value + ``largest``. The
    end element is (number of channels, 0, value 0). Notes are the channel and the position of the previous element; -1
    at the start. Raises ValueError for an order that is not in ``LIST_ORDERS``.
    """

    plane_of: Tensor
    scale_of: Tensor
    rank_of: Tensor
    size_of: Tensor
    num_notes = 2

    def __init__(
        self,
        planes: Sequence[int],
        scales: Sequence[int],
        grids: Sequence[Sequence[int]],
        largest: int,
        order: str = "natural",
    ) -> None:
        super().__init__()
        if order not in LIST_ORDERS:
            raise InputError(f"prior.order={order!r}; allowed for lists: {', '.join(LIST_ORDERS)}")
        self.order, self.largest = order, largest
        self.grids = tuple((int(rows), int(columns)) for rows, columns in grids)
        self.end = len(planes)
        self.num_positions = max(rows * columns for rows, columns in self.grids)
        # in every order, the end element belongs to the last scale and comes after all channels
        keys = [(order == "luma_first" and plane > 0, channel) for channel, plane in enumerate(planes)]
        ranks = {channel: rank for rank, (_, channel) in enumerate(sorted(keys))}
        sizes = [self.grids[plane][0] * self.grids[plane][1] for plane in planes]
        tables = {
            "plane_of": [*planes, 0],
            "scale_of": [*scales, max(scales)],
            "rank_of": [*(ranks[channel] for channel in range(self.end)), self.end],
            "size_of": [*sizes, 1],
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    # ------------------------------------------------------------------ valid next elements

    def start(self, header: Tensor) -> GrammarState:
        return self.follow(Tokens.fixed(torch.zeros(len(header), 0, 3, dtype=torch.int64)))

    def follow(self, prefix: Tokens) -> GrammarState:
        """State after a prefix with lists of equal length. Raises ValueError for an invalid element."""
        self.check(prefix, self._before(prefix))
        device, length = self.rank_of.device, prefix.ids.shape[1]
        if length:
            notes = prefix.ids[:, -1, :2].to(device, torch.int32)
        else:
            notes = torch.full((len(prefix), 2), -1, dtype=torch.int32, device=device)
        # inner: the highest rank of the channels that ``close`` has closed
        return GrammarState(notes, (notes[:, 0] != self.end).cpu(), inner=-1)

    def advance(self, state: GrammarState, element: Tensor) -> None:
        valid = self._follows(state.notes.long(), element.to(state.notes.device)).cpu() | ~state.going
        if not valid.all():
            row = int((~valid).nonzero()[0])
            raise InputError(f"list {row}: {self.describe(element[row])} cannot come next")
        going = state.going[:, None].to(state.notes.device)
        state.notes = torch.where(going, element[:, :2].to(state.notes), state.notes)
        state.going = state.going & (element[:, 0].cpu() != self.end)

    def _follows(self, notes: Tensor, element: Tensor) -> Tensor:
        """bool [...]: True for elements [..., 3] that are valid after those of the notes int64 [..., 2]."""
        channel, position, value = element.unbind(-1)
        valid_channel = (channel >= 0) & (channel <= self.end)
        clamped = channel.clamp(0, self.end)
        valid_position = (position >= 0) & (position < self.size_of[clamped])
        ended = notes[..., 0] == self.end
        previous_rank = torch.where(notes[..., 0] < 0, -1, self.rank_of[notes[..., 0].clamp(0, self.end)])
        rank = self.rank_of[clamped]
        later = (rank > previous_rank) | ((rank == previous_rank) & (position > notes[..., 1]))
        valid_value = (value >= 0) & (value <= 2 * self.largest) & ((value == self.largest) == (channel == self.end))
        return valid_channel & valid_position & later & valid_value & ~ended

    def annotate(self, tokens: Tokens) -> Tensor:
        notes = self._before(tokens)
        self.check(tokens, notes)
        return notes.masked_fill(~tokens.counted.unsqueeze(-1), 0).int()

    def _before(self, tokens: Tokens) -> Tensor:
        notes = tokens.ids[..., :2].long().roll(1, dims=1)
        notes[:, :1] = -1
        return notes

    def check(self, tokens: Tokens, notes: Tensor) -> None:
        """Raise InputError for the first element that is invalid after its notes, int64 [B, L, 2]."""
        wrong = ~self._follows(notes.to(self.rank_of.device), tokens.ids.to(self.rank_of.device))
        wrong &= tokens.counted.to(wrong.device)
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            raise InputError(
                f"list {row}: element {place} {self.describe(tokens.ids[row, place])} cannot stand there"
                + (f" after {self.describe(tokens.ids[row, place - 1])}" if place else "")
            )

    def describe(self, element: Tensor) -> str:
        """An element int64 [3] as text."""
        channel, position, value = element.tolist()
        if channel == self.end:
            return "(end)" if not position and value == self.largest else f"(end, {position}, {value - self.largest})"
        return f"(channel {channel}, position {position}, value {value - self.largest})"

    def allowed(self, notes: Tensor, partial: Tensor, strict: bool = True) -> Tensor:
        notes, partial = notes.to(self.rank_of.device).long(), partial.to(self.rank_of.device)
        previous_channel, previous_position = notes[..., :1], notes[..., 1:]
        ended = previous_channel == self.end
        if partial.shape[-1] == 0:
            rank = torch.where(previous_channel < 0, -1, self.rank_of[previous_channel.clamp(min=0)])
            same_channel = (
                (self.rank_of == rank) & (previous_position + 1 < self.size_of) if strict else self.rank_of == rank
            )
            return (self.rank_of > rank) | same_channel | ended
        channel = partial[..., :1]
        if partial.shape[-1] == 1:
            position = torch.arange(self.num_positions, device=notes.device)
            later = (channel != previous_channel) | (position > previous_position)
            # without ``strict``, a channel without free positions may be chosen: then no position is forbidden
            has_free = (channel != previous_channel) | (previous_position + 1 < self.size_of[channel])
            return (position < self.size_of[channel]) & (later | ~has_free) | ended
        value = torch.arange(2 * self.largest + 1, device=notes.device)
        return ((value == self.largest) == (channel == self.end)) | ended

    # ------------------------------------------------------------------ scales

    def scales(self, tokens: Tokens) -> Tensor:
        return self.scale_of.to(tokens.ids.device)[tokens.ids[..., 0].clamp(0, self.end)]

    def reached(self, notes: Tensor) -> Tensor:
        return self.scale_of.to(notes.device)[notes[..., 0].long().clamp(min=0)]

    def close(self, state: GrammarState, scales: Sequence[int]) -> None:
        """Forbid further elements of these scales.

        Raises ValueError if other scales come before them in this order.
        """
        closed = torch.isin(self.scale_of[: self.end].cpu(), torch.tensor(list(scales), dtype=torch.int64))
        ranks = self.rank_of[: self.end].cpu()
        if closed.any() and not bool(closed[ranks < int(closed.sum())].all()):
            raise InputError(
                f"prior.order={self.order} writes other scales before these; train a prior with another prior.order"
            )
        state.inner = int(closed.sum()) - 1

    def allowed_next(self, state: GrammarState, partial: Tensor) -> Tensor:
        """bool [B, V]: like ``allowed``, but without the closed scales."""
        allowed = self.allowed(state.notes, partial)
        if partial.shape[-1] == 0:
            open_ = (self.rank_of > state.inner) | (state.notes[:, :1] == self.end)
            allowed = allowed & open_
        return allowed

    # ------------------------------------------------------------------ order

    def sort(self, tokens: Tokens) -> tuple[Tokens, Tensor]:
        """Sort lists into the order of this grammar. Also returns the source index of each element: int64 [B, L].

        The sort is stable: elements of one channel keep their order.
        """
        return self._sorted(tokens, self.rank_of.to(tokens.ids.device)[tokens.ids[..., 0].clamp(0, self.end)])

    def sort_naturally(self, tokens: Tokens) -> Tokens:
        """Sort lists into natural order, which is the order of the channel ids."""
        return self._sorted(tokens, tokens.ids[..., 0])[0]

    def _sorted(self, tokens: Tokens, ranks: Tensor) -> tuple[Tokens, Tensor]:
        indices = ranks.masked_fill(~tokens.counted, self.end + 1).argsort(dim=1, stable=True)
        ids = tokens.ids.gather(1, indices.unsqueeze(-1).expand_as(tokens.ids))
        return Tokens(ids, tokens.lengths, tokens.header), indices
