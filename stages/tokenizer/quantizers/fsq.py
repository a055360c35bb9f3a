"""Finite scalar quantisation: each of a few bounded numbers is rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.errors import InputError
from stages.tokenizer.parts import FSQConfig
from stages.tokenizer.quantizers.digits import Digits
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision

LARGEST_FIELD = 1 << 16
"""Codes of one field; more are several fields, so that ids stay uint16 on disk and softmaxes small."""


class FSQ(Quantizer):
    """Finite scalar quantisation, arXiv 2309.15505 section 3.1. Raises ValueError for fewer than two levels."""

    levels: Tensor

    def __init__(self, config: FSQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        if not config.levels or not 2 <= min(config.levels) <= max(config.levels) <= LARGEST_FIELD:
            raise InputError(
                f"tokenizer.quantizer.levels={config.levels}; allowed: two or more values a number, {LARGEST_FIELD} at "
                "most"
            )
        self.digits = Digits(config.levels, LARGEST_FIELD)
        self.fields = self.digits.fields
        self.project_in = nn.Linear(width_in, len(config.levels))
        self.project_out = nn.Linear(len(config.levels), width_out)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def encodings(self, features: Tensor) -> Tensor:
        values = self.project_in(features)
        half = (self.levels - 1) * (1 + 1e-3) / 2
        # an even number of values has no middle: shift so that rounding gives exactly that many
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(values + torch.atanh(offset / half)) * half - offset

    def within(self, numbers: Tensor) -> Tensor:
        """Numbers held to the outermost values, -(L // 2) and (L - 1) // 2 of L: the bound of 1,001 or more lies past a
        rounding border."""
        return numbers.clamp(-(self.levels // 2), (self.levels - 1) // 2)

    def choose(self, encodings: Tensor) -> Tensor:
        return self.digits.pack(self.within(encodings.round()).long() + self.levels // 2)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            bounded = self.encodings(features.float())
            passed = bounded + (self.within(bounded.round()) - bounded).detach()
            return Quantized(self.project_out(passed / (self.levels // 2)), self.choose(bounded.detach()), {})

    def distances(self, encodings: Tensor) -> Tensor:
        """To the nearest rounding border, of the number nearest to one; at most 0.5, also past the outermost values."""
        held = self.within(encodings)
        return (0.5 - (held - held.round()).abs()).amin(-1)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        digits = self.digits.unpack(ids) - self.levels // 2
        return digits.float() / (self.levels // 2)
