"""Input embeddings of the transformer: one for layouts of fixed length, one for streams.

Both embed an element and, separately, the place of the *next* element: the slot that predicts element t holds element
t-1 and the place of element t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.layout import TokenLayout
from stages.contract import ConditionStates
from stages.grammar import PlacedGrammar
from stages.prior.blocks import SwiGLU


class InputEmbedding(nn.Module, ABC):
    """Embed elements and places with the transformer's width D."""

    @abstractmethod
    def elements(self, ids: Tensor, first: int, notes: Tensor | None) -> Tensor:
        """Embed elements ids [B, n, F] at positions ``first`` and after, with their ``notes`` [B, n, P]: [B, n, D]."""

    @abstractmethod
    def places(self, start: int, stop: int, notes: Tensor | None) -> Tensor:
        """Embed the places of elements ``start`` to ``stop``, with their ``notes`` [B, n, P]: [n, D] or [B, n, D]."""

    @abstractmethod
    def fields(self, hidden: Tensor, first: int, chosen: Tensor) -> Tensor:
        """Add the chosen fields [..., f] of the element at ``first`` to hidden states [..., D]: [..., D]."""

    def common(self, header: Tensor, states: ConditionStates) -> Tensor | None:
        """Features [B, 1, D] added to every slot; None for none."""
        return None


class GridEmbedding(InputEmbedding):
    """One embedding table per codebook and field, plus learned embeddings of scale, row and column.

    Elements are in the order of ``permutation`` (``stages/prior/order.py``).

    The embeddings of the element's fields chosen so far are normalized to the size of the hidden state (embeddings are
    small at initialization), added to it, and passed through a small network. A sum alone would shift the next field's
    logits by the chosen fields regardless of the preceding elements, so it cannot learn a field that depends on both.
    """

    offsets: Tensor
    scale_of: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, layout: TokenLayout, width: int, permutation: Sequence[int]) -> None:
        super().__init__()
        first_row: dict[tuple[int, int], int] = {}
        num_rows = 0
        for codebook in layout.codebooks:
            for index, part in enumerate(layout.fields_of(codebook)):
                first_row[codebook, index] = num_rows
                num_rows += part.vocabulary_size
        self.table = nn.Embedding(num_rows, width)
        natural = [
            (number, *((divmod(index, scale.grid[1])) if scale.grid else (0, index)), scale.codebook)
            for number, scale in enumerate(layout.scales)
            for index in range(scale.length)
        ]
        places = [natural[element] for element in permutation]
        offsets = [[first_row[place[3], index] for index in range(layout.num_fields)] for place in places]
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        for name, column in (("scale_of", 0), ("row_of", 1), ("column_of", 2)):
            self.register_buffer(name, torch.tensor([place[column] for place in places]), persistent=False)
        self.scale_embedding = nn.Embedding(len(layout.scales), width)
        self.row_embedding = nn.Embedding(1 + max(place[1] for place in places), width)
        self.column_embedding = nn.Embedding(1 + max(place[2] for place in places), width)
        if layout.num_fields > 1:
            self.chosen_norm = nn.RMSNorm(width)
            self.mix = SwiGLU(width, 2 * width)

    def elements(self, ids: Tensor, first: int, notes: Tensor | None) -> Tensor:
        return self.table(ids + self.offsets[first : first + ids.shape[1]]).sum(2)

    def places(self, start: int, stop: int, notes: Tensor | None) -> Tensor:
        part = slice(start, stop)
        return (
            self.scale_embedding(self.scale_of[part])
            + self.row_embedding(self.row_of[part])
            + self.column_embedding(self.column_of[part])
        )

    def fields(self, hidden: Tensor, first: int, chosen: Tensor) -> Tensor:
        number = chosen.shape[-1]
        if not number:
            return hidden
        hidden = hidden + self.chosen_norm(self.table(chosen + self.offsets[first, :number]).sum(-2))
        return hidden + self.mix(hidden)


class StreamEmbedding(InputEmbedding):
    """Concatenate and project the one-hot token, its place, the next place, the header and the condition.

    There is no token table and there are no additive positions, after Mattar et al. (arXiv 2406.19997, section 4). The
    projection of a concatenation is the sum of the parts' projections, so parts can be computed separately. With
    ``context`` the next place also holds what the grammar knows there: which ids are allowed, and the neighbors.
    """

    def __init__(self, layout: TokenLayout, grammar: PlacedGrammar, width: int, context: bool) -> None:
        super().__init__()
        assert layout.num_fields == 1 and len(layout.codebooks) == 1
        self.grammar = grammar
        self.context = context
        self.vocabulary = layout.fields_of(layout.codebooks[0])[0].vocabulary_size
        self.header_sizes = [part.vocabulary_size for part in layout.header]
        self.element = nn.Linear(self.vocabulary + grammar.place_width, width, bias=False)
        self.next_place = nn.Linear(grammar.place_width + context * grammar.known_width, width)
        self.header = nn.Linear(sum(self.header_sizes), width, bias=False)
        self.condition = nn.Linear(width, width, bias=False)

    def elements(self, ids: Tensor, first: int, notes: Tensor | None) -> Tensor:
        assert notes is not None
        token = functional.one_hot(ids[..., 0], self.vocabulary)
        return self.element(torch.cat([token, self.grammar.place(notes)], dim=-1))

    def places(self, start: int, stop: int, notes: Tensor | None) -> Tensor:
        assert notes is not None
        place = self.grammar.place(notes)
        return self.next_place(torch.cat([place, self.grammar.known(notes)], dim=-1) if self.context else place)

    def fields(self, hidden: Tensor, first: int, chosen: Tensor) -> Tensor:
        return hidden

    def common(self, header: Tensor, states: ConditionStates) -> Tensor:
        parts = [functional.one_hot(header[:, index], size) for index, size in enumerate(self.header_sizes)]
        header_features = self.header(torch.cat(parts, dim=-1).to(self.header.weight.dtype))
        return (header_features + self.condition(states.prefix.mean(1))).unsqueeze(1)
