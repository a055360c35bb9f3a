"""Grammars: what may come next in a stream or a list, for tokenizer, loader and prior alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data.layout import Tokens


@dataclass
class GrammarState:
    """Streams while they grow."""

    notes: Tensor
    """int32 [B, num_notes], where the grammar wants them"""
    going: Tensor
    """bool [B]: which streams have not ended, on the CPU."""
    inner: Any
    """The grammar's own."""


class Grammar(nn.Module, ABC):
    """What may come next, and what is known before it does. Built from ``TokenLayout.grammar`` alone.

    Its notes are whole numbers, int32 [..., num_notes], one row before each element; what they mean is its own affair.
    """

    num_notes: int

    @abstractmethod
    def start(self, header: Tensor) -> GrammarState:
        """The beginning of streams with side information int64 [B, S]. Raises ValueError for one that cannot be."""

    @abstractmethod
    def advance(self, state: GrammarState, element: Tensor) -> None:
        """Follow an element int64 [B, F] in each stream that has not ended. Raises ValueError for an illegal one."""

    @abstractmethod
    def annotate(self, tokens: Tokens) -> Tensor:
        """Notes int32 [B, L, num_notes] of whole streams or beginnings of them, 0 behind their lengths.

        Raises ValueError that names the place of the first illegal element.
        """

    @abstractmethod
    def allowed(self, notes: Tensor, partial: Tensor, strict: bool = True) -> Tensor:
        """bool [..., V]: which ids may come next, given the fields int64 [..., f] of the same element chosen so far.

        Where nothing may, nothing is forbidden: the stream has ended. Without ``strict``, what only the rules of the
        code forbid, not what the elements before make impossible.
        """

    @abstractmethod
    def scales(self, tokens: Tokens) -> Tensor:
        """int64 [B, L]: the layout's scale of each element that counts."""

    @abstractmethod
    def reached(self, notes: Tensor) -> Tensor:
        """int64 [...]: the scale that a stream has reached; the next element belongs to no earlier one."""


class PlacedGrammar(Grammar):
    """A grammar that knows the place of an element before the element is known."""

    place_width: int
    """Features of an element's place."""
    known_width: int
    """Features of what else is known before an element."""

    def scales(self, tokens: Tokens) -> Tensor:
        notes = self.annotate(tokens) if tokens.notes is None else tokens.notes
        return self.reached(notes.to(tokens.ids.device))

    @abstractmethod
    def place(self, notes: Tensor) -> Tensor:
        """float32 [..., place_width]: where the next element belongs."""

    @abstractmethod
    def known(self, notes: Tensor) -> Tensor:
        """float32 [..., known_width]: what else is known before it."""
