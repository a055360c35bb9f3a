"""Lists of non-zero coefficients: what a list says, what may come next in it, and its orders.

A list is a sequence of elements (channel, position, value) and one end element. Its coefficients form planes (Y, Cb,
Cr), a plane has channels (frequencies), a channel one coefficient for each position of the plane's grid of blocks.
After *Generating Images with Sparse Representations* (Nash et al., arXiv 2103.03841, section 3).
What is notable here:

- channel ids are numbered in decoding order, so a list in natural order rises in (channel, position);
- all is tables and comparisons of whole arrays: nothing walks along a list;
- another order is another rank of the channels: lists are sorted by it, and its grammar compares by it.
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
    """Lists over ``grids`` (rows, columns) of positions, one a plane, with values from -``largest`` to ``largest``.

    ``planes`` and ``scales`` say of each channel to which it belongs. A value's id is value + ``largest``. The end
    element is (number of channels, 0, value 0). Notes are the channel and the position of the element before; -1 at
    the beginning. Raises ValueError for an order that is none of ``LIST_ORDERS``.
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
        # the end element belongs to the last scale and comes after every channel, in any order
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

    # ------------------------------------------------------------------ what may come next

    def start(self, header: Tensor) -> GrammarState:
        return self.follow(Tokens.fixed(torch.zeros(len(header), 0, 3, dtype=torch.int64)))

    def follow(self, prefix: Tokens) -> GrammarState:
        """The state behind lists that are equally long. Raises ValueError for an illegal element."""
        self.check(prefix, self._before(prefix))
        device, length = self.rank_of.device, prefix.ids.shape[1]
        if length:
            notes = prefix.ids[:, -1, :2].to(device, torch.int32)
        else:
            notes = torch.full((len(prefix), 2), -1, dtype=torch.int32, device=device)
        # the rank up to which scales were closed
        return GrammarState(notes, (notes[:, 0] != self.end).cpu(), inner=-1)

    def advance(self, state: GrammarState, element: Tensor) -> None:
        fine = self._follows(state.notes.long(), element.to(state.notes.device)).cpu() | ~state.going
        if not fine.all():
            row = int((~fine).nonzero()[0])
            raise InputError(f"list {row}: {self.describe(element[row])} cannot come next")
        going = state.going[:, None].to(state.notes.device)
        state.notes = torch.where(going, element[:, :2].to(state.notes), state.notes)
        state.going = state.going & (element[:, 0].cpu() != self.end)

    def _follows(self, notes: Tensor, element: Tensor) -> Tensor:
        """bool [...]: whether elements [..., 3] may stand after those of the notes int64 [..., 2]."""
        channel, position, value = element.unbind(-1)
        known = (channel >= 0) & (channel <= self.end)
        place = channel.clamp(0, self.end)
        inside = (position >= 0) & (position < self.size_of[place])
        ended = notes[..., 0] == self.end
        before = torch.where(notes[..., 0] < 0, -1, self.rank_of[notes[..., 0].clamp(0, self.end)])
        rank = self.rank_of[place]
        later = (rank > before) | ((rank == before) & (position > notes[..., 1]))
        real = (value >= 0) & (value <= 2 * self.largest) & ((value == self.largest) == (channel == self.end))
        return known & inside & later & real & ~ended

    def annotate(self, tokens: Tokens) -> Tensor:
        notes = self._before(tokens)
        self.check(tokens, notes)
        return notes.masked_fill(~tokens.counted.unsqueeze(-1), 0).int()

    def _before(self, tokens: Tokens) -> Tensor:
        notes = tokens.ids[..., :2].long().roll(1, dims=1)
        notes[:, :1] = -1
        return notes

    def check(self, tokens: Tokens, notes: Tensor) -> None:
        """Raise InputError for the first element that cannot follow ``notes`` int64 [B, L, 2], those before it."""
        wrong = ~self._follows(notes.to(self.rank_of.device), tokens.ids.to(self.rank_of.device))
        wrong &= tokens.counted.to(wrong.device)
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            raise InputError(
                f"list {row}: element {place} {self.describe(tokens.ids[row, place])} cannot stand there"
                + (f" after {self.describe(tokens.ids[row, place - 1])}" if place else "")
            )

    def describe(self, element: Tensor) -> str:
        """An element int64 [3] in words."""
        channel, position, value = element.tolist()
        if channel == self.end:
            return "(end)" if not position and value == self.largest else f"(end, {position}, {value - self.largest})"
        return f"(channel {channel}, position {position}, value {value - self.largest})"

    def allowed(self, notes: Tensor, partial: Tensor, strict: bool = True) -> Tensor:
        notes, partial = notes.to(self.rank_of.device).long(), partial.to(self.rank_of.device)
        before, at = notes[..., :1], notes[..., 1:]
        ended = before == self.end
        if partial.shape[-1] == 0:
            rank = torch.where(before < 0, -1, self.rank_of[before.clamp(min=0)])
            same = (self.rank_of == rank) & (at + 1 < self.size_of) if strict else self.rank_of == rank
            return (self.rank_of > rank) | same | ended
        channel = partial[..., :1]
        if partial.shape[-1] == 1:
            position = torch.arange(self.num_positions, device=notes.device)
            later = (channel != before) | (position > at)
            # without ``strict`` a channel may be named of which nothing is left: then no position is forbidden
            left = (channel != before) | (at + 1 < self.size_of[channel])
            return (position < self.size_of[channel]) & (later | ~left) | ended
        value = torch.arange(2 * self.largest + 1, device=notes.device)
        return ((value == self.largest) == (channel == self.end)) | ended

    # ------------------------------------------------------------------ scales

    def scales(self, tokens: Tokens) -> Tensor:
        return self.scale_of.to(tokens.ids.device)[tokens.ids[..., 0].clamp(0, self.end)]

    def reached(self, notes: Tensor) -> Tensor:
        return self.scale_of.to(notes.device)[notes[..., 0].long().clamp(min=0)]

    def close(self, state: GrammarState, scales: Sequence[int]) -> None:
        """Nothing of these scales comes any more, though the end of them may not have been reached.

        Raises ValueError where others come before them in this order.
        """
        closed = torch.isin(self.scale_of[: self.end].cpu(), torch.tensor(list(scales), dtype=torch.int64))
        ranks = self.rank_of[: self.end].cpu()
        if closed.any() and not bool(closed[ranks < int(closed.sum())].all()):
            raise InputError(
                f"prior.order={self.order} writes other scales before these; train a prior with another prior.order"
            )
        state.inner = int(closed.sum()) - 1

    def allowed_next(self, state: GrammarState, partial: Tensor) -> Tensor:
        """bool [B, V]: ``allowed``, without the scales that were closed."""
        allowed = self.allowed(state.notes, partial)
        if partial.shape[-1] == 0:
            open_ = (self.rank_of > state.inner) | (state.notes[:, :1] == self.end)
            allowed = allowed & open_
        return allowed

    # ------------------------------------------------------------------ order

    def sort(self, tokens: Tokens) -> tuple[Tokens, Tensor]:
        """The same lists in this grammar's order, and from where each element was taken: int64 [B, L].

        A stable sort: elements of one channel keep their order.
        """
        return self._sorted(tokens, self.rank_of.to(tokens.ids.device)[tokens.ids[..., 0].clamp(0, self.end)])

    def sort_naturally(self, tokens: Tokens) -> Tokens:
        """The same lists in natural order: channels are numbered in it."""
        return self._sorted(tokens, tokens.ids[..., 0])[0]

    def _sorted(self, tokens: Tokens, ranks: Tensor) -> tuple[Tokens, Tensor]:
        taken = ranks.masked_fill(~tokens.counted, self.end + 1).argsort(dim=1, stable=True)
        ids = tokens.ids.gather(1, taken.unsqueeze(-1).expand_as(tokens.ids))
        return Tokens(ids, tokens.lengths, tokens.header), taken
