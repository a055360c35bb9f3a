"""Grammars: define the valid next ids in a stream or list. Used by tokenizer, data loader and prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data.layout import Tokens


@dataclass
class GrammarState:
    """State of a batch of unfinished streams."""

    notes: Tensor
    """int32 [B, num_notes], on the device of the grammar."""
    going: Tensor
    """bool [B], on the CPU: False for streams that have ended."""
    inner: Any
    """Internal state of the grammar."""


class Grammar(nn.Module, ABC):
    """Defines which ids are valid next, given the earlier elements. Built from ``TokenLayout.grammar`` alone.

    Its notes are integers, int32 [..., num_notes]: the state before each element. Only the grammar interprets them.
    """

    num_notes: int

    @abstractmethod
    def start(self, header: Tensor) -> GrammarState:
        """Initial state of streams with side information int64 [B, S]. Raises ValueError for an invalid header."""

    @abstractmethod
    def advance(self, state: GrammarState, element: Tensor) -> None:
        """Append an element int64 [B, F] to each stream that has not ended. Raises ValueError if it is invalid."""

    @abstractmethod
    def annotate(self, tokens: Tokens) -> Tensor:
        """Notes int32 [B, L, num_notes] of complete streams or prefixes of them, 0 for padding.

        Raises ValueError, which names the position of the first invalid element.
        """

    @abstractmethod
    def allowed(self, notes: Tensor, partial: Tensor, strict: bool = True) -> Tensor:
        """bool [..., V]: the ids allowed next, given the earlier fields int64 [..., f] of the same element.

        After the end of a stream, all ids are allowed. Without ``strict``, only the rules of the code are applied:
        ids that are impossible only because of earlier elements are allowed.
        """

    @abstractmethod
    def scales(self, tokens: Tokens) -> Tensor:
        """int64 [B, L]: scale of each element; undefined for padding."""

    @abstractmethod
    def reached(self, notes: Tensor) -> Tensor:
        """int64 [...]: the current scale of a stream; later elements belong to this scale or to a later one."""


class PlacedGrammar(Grammar):
    """A grammar in which the place of the next element is known before the element itself."""

    place_width: int
    """Number of features of ``place``."""
    known_width: int
    """Number of features of ``known``."""

    def scales(self, tokens: Tokens) -> Tensor:
        notes = self.annotate(tokens) if tokens.notes is None else tokens.notes
        return self.reached(notes.to(tokens.ids.device))

    @abstractmethod
    def place(self, notes: Tensor) -> Tensor:
        """float32 [..., place_width]: features of the place of the next element."""

    @abstractmethod
    def known(self, notes: Tensor) -> Tensor:
        """float32 [..., known_width]: other features known before the next element."""
