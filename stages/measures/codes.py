"""Use of a tokenizer's codes. Codebook collapse shows here first, mostly at the coarse scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.layout import Scale, TokenLayout, Tokens
from stages.scales import scale_ids

TOKENS_EACH = 10
"""Minimum number of tokens per combination of fields for a meaningful joint entropy."""


@dataclass(frozen=True)
class CodeUse:
    """Use of a field's vocabulary in one scale."""

    scale: str
    field: str
    codebook: int
    num_tokens: int
    """Number of counted tokens, an upper bound of ``used``."""
    vocabulary_size: int
    used: int
    """Number of codes that occur."""
    share: float
    """used / vocabulary_size"""
    perplexity: float
    """exp of the entropy of the ids, from 1 to vocabulary_size (uniform use)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class JointUse:
    """Use of the combinations of all fields in one scale, for elements with several fields."""

    scale: str
    num_tokens: int
    used: int
    """Number of combinations that occur."""
    entropy_bits: float
    """Entropy of the combinations in bits per token; at most log2 of num_tokens, and too low if close to it."""
    field_bits: float
    """Sum of the fields' own entropies; its difference to ``entropy_bits`` is the fields' mutual information."""
    too_few_tokens: bool
    """True for fewer than ``TOKENS_EACH`` tokens per occurring combination; the joint entropy is then unreliable."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of counts [V]: 1 for a single code, V for uniform use. Raises ValueError if all counts are 0."""
    total = counts.sum()
    if total == 0:
        raise ValueError("no tokens were counted; allowed: at least one")
    shares = counts[counts > 0].double() / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def code_use(tokens: Tokens, layout: TokenLayout, numbers: Sequence[int] = ()) -> list[CodeUse]:
    """One entry per scale and field of tokens with ids [N, L, F]; elements beyond a sample's length do not count.

    ``numbers`` selects scales (the first is 1); empty selects all. Scales without any element are left out.
    """
    uses: list[CodeUse] = []
    for scale, ids in _by_scale(tokens, layout, numbers):
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


def joint_use(tokens: Tokens, layout: TokenLayout) -> list[JointUse]:
    """One entry per scale of a layout of fixed length with several fields; empty for other layouts."""
    if layout.num_fields == 1 or layout.ends != "fixed":
        return []
    uses: list[JointUse] = []
    for scale, ids in _by_scale(tokens, layout):
        counts = torch.unique(ids, dim=0, return_counts=True)[1]
        field_counts = [torch.bincount(field) for field in ids.unbind(1)]
        uses.append(
            JointUse(
                scale=scale.name,
                num_tokens=len(ids),
                used=len(counts),
                entropy_bits=math.log2(perplexity(counts)),
                field_bits=sum(math.log2(perplexity(field_count)) for field_count in field_counts),
                too_few_tokens=len(ids) < TOKENS_EACH * len(counts),
            )
        )
    return uses


def _by_scale(tokens: Tokens, layout: TokenLayout, numbers: Sequence[int] = ()) -> Iterator[tuple[Scale, Tensor]]:
    """Yield (scale, ids [n, F] of its counted elements) for the scales ``numbers``, or for all; skip empty scales."""
    # in parts, because the notes that locate the scales of streams need many times the memory of the tokens
    scales = torch.cat([scale_ids(part, layout) for part in tokens.split(256)]).masked_fill(~tokens.counted, -1)
    for number, scale in enumerate(layout.scales):
        ids = tokens.ids[scales == number]
        if len(ids) and (not numbers or number + 1 in numbers):
            yield scale, ids
