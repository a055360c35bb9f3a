"""How a tokenizer's codes are used: a codebook that collapsed shows here first, mostly at the coarse scales."""

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
"""Tokens for each combination of fields, at least, for their joint entropy to mean something."""


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


@dataclass(frozen=True)
class JointUse:
    """Use of the combinations of all fields in one scale of elements that have several."""

    scale: str
    num_tokens: int
    used: int
    """Combinations that occur."""
    entropy_bits: float
    """Entropy of the combinations, in bits a token; at most log2 of num_tokens, and too low where that is near."""
    field_bits: float
    """Sum of the fields' own entropies: what the joint one is below it, the fields tell of each other."""
    too_few_tokens: bool
    """Fewer than ``TOKENS_EACH`` tokens for each combination that occurs: the joint entropy means little."""

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
    """One entry per scale of a layout of fixed length with several fields; none for any other."""
    if layout.num_fields == 1 or layout.ends != "fixed":
        return []
    found: list[JointUse] = []
    for scale, ids in _by_scale(tokens, layout):
        counts = torch.unique(ids, dim=0, return_counts=True)[1]
        alone = [torch.bincount(field) for field in ids.unbind(1)]
        found.append(
            JointUse(
                scale=scale.name,
                num_tokens=len(ids),
                used=len(counts),
                entropy_bits=math.log2(perplexity(counts)),
                field_bits=sum(math.log2(perplexity(each)) for each in alone),
                too_few_tokens=len(ids) < TOKENS_EACH * len(counts),
            )
        )
    return found


def _by_scale(tokens: Tokens, layout: TokenLayout, numbers: Sequence[int] = ()) -> Iterator[tuple[Scale, Tensor]]:
    """(scale, ids [n, F] of all samples that count) of the scales with these ``numbers``, or of all, if there are."""
    # part by part: the notes by which streams find their scales take many times the room of the tokens
    scales = torch.cat([scale_ids(part, layout) for part in tokens.split(256)]).masked_fill(~tokens.counted, -1)
    for number, scale in enumerate(layout.scales):
        ids = tokens.ids[scales == number]
        if len(ids) and (not numbers or number + 1 in numbers):
            yield scale, ids
