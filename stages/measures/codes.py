"""How a tokenizer's codes are used: a codebook that collapsed shows here first, mostly at the coarse scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.layout import TokenLayout, Tokens
from stages.scales import scale_ids


@dataclass(frozen=True)
class CodeUse:
    """Use of one field's vocabulary in one scale."""

    scale: str
    field: str
    codebook: int
    num_tokens: int
    """Tokens counted; no more codes than that can be used."""
    vocabulary_size: int
    used: int
    """Codes that occur."""
    share: float
    """used / vocabulary_size"""
    perplexity: float
    """exp of the entropy of the ids: the number of codes that equal use would need; 1 … vocabulary_size."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of counts [V]: 1 for a single code, V for equal use. Raises ValueError for counts without tokens."""
    total = counts.sum()
    if total == 0:
        raise ValueError("no tokens were counted")
    shares = counts[counts > 0].double() / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def code_use(tokens: Tokens, layout: TokenLayout, numbers: Sequence[int] = ()) -> list[CodeUse]:
    """One entry per scale and field of tokens with ids [N, L, F]; elements beyond a sample's length do not count.

    Of the scales with these ``numbers`` (the first is 1), or of all; those in which no sample has an element are left
    out.
    """
    # part by part: the notes by which streams find their scales take many times the room of the tokens
    scales = torch.cat([scale_ids(part, layout) for part in tokens.split(256)]).masked_fill(~tokens.counted, -1)
    uses: list[CodeUse] = []
    for number, scale in enumerate(layout.scales):
        if numbers and number + 1 not in numbers:
            continue
        ids = tokens.ids[scales == number]
        if not len(ids):
            continue
        for index, field in enumerate(scale.fields):
            counts = torch.bincount(ids[:, index], minlength=field.vocabulary_size)
            used = int((counts > 0).sum())
            uses.append(
                CodeUse(
                    scale=scale.name,
                    field=field.name,
                    codebook=scale.codebook,
                    num_tokens=len(ids),
                    vocabulary_size=field.vocabulary_size,
                    used=used,
                    share=used / field.vocabulary_size,
                    perplexity=perplexity(counts),
                )
            )
    return uses
