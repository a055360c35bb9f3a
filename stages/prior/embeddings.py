"""What the transformer sees of a sequence: one input embedding for layouts of fixed length, one for streams.

Both say what an element *is* and, apart from it, where the *next* one belongs: the slot that predicts element t holds
element t-1 and the place of element t.
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
    """Elements and places as features of the transformer's width."""

    @abstractmethod
    def elements(self, ids: Tensor, first: int, notes: Tensor | None) -> Tensor:
        """[B, n, D] of the elements ids [B, n, F] that stand at ``first`` and after; ``notes`` [B, n, P] are theirs."""

    @abstractmethod
    def places(self, start: int, stop: int, notes: Tensor | None) -> Tensor:
        """[n, D] or [B, n, D] of the places of elements ``start`` to ``stop``, whose ``notes`` are [B, n, P]."""

    @abstractmethod
    def fields(self, hidden: Tensor, first: int, chosen: Tensor) -> Tensor:
        """Hidden states [..., D] that also know the fields chosen [..., f] of the element at ``first``."""

    def common(self, header: Tensor, states: ConditionStates) -> Tensor | None:
        """[B, 1, D] that every slot is told; None for nothing."""
        return None


class GridEmbedding(InputEmbedding):
    """A table for each codebook and field, and learned positions: scale, row and column.

    Elements come in the order of ``permutation`` (``stages/prior/order.py``).

    Fields of the same element chosen before are added to the hidden state, as large as that (embeddings are small at
    first), and both go through a small network: a sum alone shifts the next field's logits by what was chosen, whatever
    stood before the element, so it cannot learn a field that follows from both.
    """

    offsets: Tensor
    scale_of: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, layout: TokenLayout, width: int, permutation: Sequence[int]) -> None:
        super().__init__()
        first_row: dict[tuple[int, int], int] = {}
        rows = 0
        for codebook in layout.codebooks:
            for index, part in enumerate(layout.fields_of(codebook)):
                first_row[codebook, index] = rows
                rows += part.vocabulary_size
        self.table = nn.Embedding(rows, width)
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
    """One-hot token, where it stood and where the next one belongs, header and condition: concatenated and projected.

    No table of tokens and no additive positions, after Mattar et al. (arXiv 2406.19997, section 4). A projection of
    what is concatenated is the sum of the parts' projections, so the parts may come at different times. With
    ``context`` the next place also says what the grammar knows there: which ids may come, and of its neighbours.
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
        told = self.header(torch.cat(parts, dim=-1).to(self.header.weight.dtype))
        return (told + self.condition(states.prefix.mean(1))).unsqueeze(1)
