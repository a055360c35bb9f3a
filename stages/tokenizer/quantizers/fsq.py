"""Finite scalar quantization: rounds each of a few bounded numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.errors import InputError
from stages.tokenizer.parts import FSQConfig
from stages.tokenizer.quantizers.digits import Digits
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision

LARGEST_FIELD = 1 << 16
"""Maximum codes of a field. More codes are split into several fields, so ids are uint16 on disk and softmaxes small."""


class FSQ(Quantizer):
    """Finite scalar quantization, arXiv 2309.15505 section 3.1.

    Raises ValueError for empty ``levels``, or a number of values below 2 or above ``LARGEST_FIELD``.
    """

    levels: Tensor

    def __init__(self, config: FSQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        if not config.levels or not 2 <= min(config.levels) <= max(config.levels) <= LARGEST_FIELD:
            raise InputError(
                f"tokenizer.quantizer.levels={config.levels}; allowed: a list of numbers from 2 to {LARGEST_FIELD}"
            )
        self.digits = Digits(config.levels, LARGEST_FIELD)
        self.fields = self.digits.fields
        self.project_in = nn.Linear(width_in, len(config.levels))
        self.project_out = nn.Linear(len(config.levels), width_out)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def encodings(self, features: Tensor) -> Tensor:
        values = self.project_in(features)
        half = (self.levels - 1) * (1 + 1e-3) / 2
        # an even number of values is not symmetric: shift so that rounding gives exactly that many
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(values + torch.atanh(offset / half)) * half - offset

    def within(self, numbers: Tensor) -> Tensor:
        """Clamp numbers to the L values from -(L // 2) to (L - 1) // 2. For L of 1,001 or more, ``encodings`` can round
        to values outside."""
        return numbers.clamp(-(self.levels // 2), (self.levels - 1) // 2)

    def choose(self, encodings: Tensor) -> Tensor:
        return self.digits.pack(self.within(encodings.round()).long() + self.levels // 2)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            bounded = self.encodings(features.float())
            passed = bounded + (self.within(bounded.round()) - bounded).detach()
            return Quantized(self.project_out(passed / (self.levels // 2)), self.choose(bounded.detach()), {})

    def distances(self, encodings: Tensor) -> Tensor:
        """Smallest distance of a number to a rounding boundary: at most 0.5, also outside of the outermost values."""
        clamped = self.within(encodings)
        return (0.5 - (clamped - clamped.round()).abs()).amin(-1)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        digits = self.digits.unpack(ids) - self.levels // 2
        return digits.float() / (self.levels // 2)
