"""Grammar of bit-plane streams: the state machine of ``stages/codecs/kernels.py`` for batches of streams.

The paper's rules say which tokens are valid for the state of a coefficient. This grammar also applies their
consequences. In a group opened in this plane, the fourth coefficient is significant after three Insignificant. In an
opened block, the fourth group is opened after three Group2x2. Below an Insignificant coefficient whose tree is not
empty, the fourth tree is not empty after three empty ones.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.errors import InputError
from data.layout import Tokens
from stages.codecs import kernels
from stages.codecs.scan import NEIGHBOURS, scan_of
from stages.grammar import GrammarState, PlacedGrammar
from stages.spectral.nested import levels_of

Variant = Literal["blocks", "zerotree"]
NAMES: dict[str, tuple[str, ...]] = {
    "blocks": ("Group4x4", "Group2x2", "Insignificant", "Positive", "Negative", "Lower", "Upper"),
    "zerotree": ("ZeroTree", "Insignificant", "Positive", "Negative", "Lower", "Upper"),
}
"""Tokens of each variant. Lower and Upper refine a coefficient; in the paper: NextAccuracy0 and NextAccuracy1."""
FREQUENCIES = (1, 2, 4, 8)
"""Frequencies of the positional features, in half waves across the image."""


class BitplaneGrammar(PlacedGrammar):
    """Streams of images [channels, side, side] with up to ``planes`` bit-planes; the last has threshold ``final``.

    The header of a stream is its number of planes. Notes are [index in the scan, plane counted from the coarsest, bit
    mask of allowed ids, the same with ids ruled out only by earlier tokens, and one number for each of ``NEIGHBOURS``:
    its sign times the number of planes since it became significant, counting from 1, or 0 while it is insignificant].
    """

    features: Tensor

    def __init__(self, side: int, channels: int, planes: int, final: float, variant: Variant) -> None:
        super().__init__()
        kernels.warn_if_slow()
        self.planes, self.final, self.variant = planes, final, variant
        self.scan = scan_of(side, channels)
        self.names = NAMES[variant]
        self.zerotree = variant == "zerotree"
        scan = self.scan
        # arguments of the kernels
        self._code = (planes, final, scan.parent, scan.child, scan.neighbours, self.zerotree)
        self.num_notes = 4 + len(NEIGHBOURS)
        tables = [
            functional.one_hot(torch.from_numpy(table), size).float()
            for table, size in (
                (self.scan.level, levels_of(side) + 1),
                (self.scan.band, 4),
                (self.scan.channel, channels),
            )
        ]
        place = torch.from_numpy(self.scan.place)
        waves = [part(torch.pi * n * place) for n in FREQUENCIES for part in (torch.sin, torch.cos)]
        self.register_buffer("features", torch.cat([*tables, place, *waves], dim=1), persistent=False)
        self.place_width = self.features.shape[1] + planes
        self.known_width = len(self.names) + 3 * len(NEIGHBOURS)

    def start(self, header: Tensor) -> GrammarState:
        planes = self.check_header(header)
        size, count = len(self.scan.order), len(planes)
        inner = {
            "planes": planes,
            "registers": np.zeros((count, kernels.REGISTERS), np.int64),
            "approximation": np.zeros((count, size), np.float64),
            "marks": np.zeros((count, 3, size if self.zerotree else 1), np.int16),
        }
        notes = np.zeros((count, self.num_notes), np.int32)
        state = GrammarState(torch.from_numpy(notes), torch.ones(count, dtype=torch.bool), inner)
        self._advance(state, np.full(count, -1))
        return state

    def advance(self, state: GrammarState, element: Tensor) -> None:
        self._advance(state, element[:, 0].cpu().numpy())

    def _advance(self, state: GrammarState, tokens: np.ndarray) -> None:
        inner: dict[str, Any] = state.inner
        invalid_row = kernels.advance(
            tokens,
            state.going.numpy(),
            inner["registers"],
            inner["approximation"],
            inner["marks"],
            inner["planes"],
            *self._code,
            state.notes.numpy(),
        )
        if invalid_row >= 0:
            raise InputError(f"stream {invalid_row}: {self._name(int(tokens[invalid_row]))} cannot come next")

    def annotate(self, tokens: Tokens) -> Tensor:
        ids, planes = tokens.ids[..., 0].cpu().numpy().astype(np.int64), self.check_header(tokens.header)
        notes = np.zeros((*ids.shape, self.num_notes), np.int32)
        self.check(ids, *kernels.annotate(ids, tokens.lengths.cpu().numpy(), planes, *self._code, notes))
        return torch.from_numpy(notes)

    def check(self, ids: np.ndarray, row: int, position: int) -> None:
        """Raise InputError for an invalid token at ``row`` and ``position``, as returned by a kernel; -1 for none."""
        if row >= 0:
            name = self._name(int(ids[row, position]))
            raise InputError(f"stream {row}: token {position} ({name}) cannot stand there")

    def check_header(self, header: Tensor) -> np.ndarray:
        """Numbers of planes int64 [B] of headers [B, 1]. Raises InputError for numbers outside 0 … ``planes``."""
        planes = header[:, 0].cpu().numpy().astype(np.int64)
        if len(planes) and not 0 <= planes.min() <= planes.max() <= self.planes:
            wrong = planes.max() if planes.max() > self.planes else planes.min()
            raise InputError(f"a stream of {wrong} bit-planes; allowed: 0 to {self.planes}")
        return planes

    def allowed(self, notes: Tensor, partial: Tensor, strict: bool = True) -> Tensor:
        return self._allowed_ids(notes, 2 if strict else 3)

    def _allowed_ids(self, notes: Tensor, column: int) -> Tensor:
        bits = notes[..., column, None]
        which = torch.arange(len(self.names), device=notes.device)
        return ((bits >> which) & 1).bool() | (bits == 0)

    def reached(self, notes: Tensor) -> Tensor:
        return notes[..., 1].long()

    def place(self, notes: Tensor) -> Tensor:
        plane = functional.one_hot(notes[..., 1].long(), self.planes)
        return torch.cat([self.features[notes[..., 0].long()], plane], dim=-1)

    def known(self, notes: Tensor) -> Tensor:
        neighbors = notes[..., 4:].float()
        features = (neighbors.sign(), neighbors.abs().clamp(max=8) / 4, (neighbors != 0).float())
        return torch.cat([self._allowed_ids(notes, 2).float(), *features], dim=-1)

    def _name(self, token: int) -> str:
        return self.names[token] if 0 <= token < len(self.names) else f"id {token}"
