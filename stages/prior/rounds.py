"""How many elements of a scale are open, in training and from round to round: the law of MaskGIT (arXiv 2202.04200).

A cosine: of a scale's elements the share cos(π/2 · u) is masked, u uniform in training, the share of rounds done while
sampling; so the first rounds decide few elements and the last ones many.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_ROUNDS = (8, 2, 1)
"""Rounds of the first scales where nothing else is said; those after them have as many as the last."""


def rounds_of(asked: Sequence[int], num_scales: int) -> list[int]:
    """Rounds of every scale: ``asked`` has one number, one for each scale, or none for ``FIRST_ROUNDS``."""
    given = list(asked or FIRST_ROUNDS)
    return [given[min(number, len(given) - 1)] for number in range(num_scales)]


def random_mask(batch: int, lengths: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """bool [B, sum of lengths]: a random part of each scale, one element or more, its size by the law."""
    parts = []
    for length in lengths:
        share = torch.rand(batch, 1, device=device, generator=generator)
        parts.append(_part(share, torch.rand(batch, length, device=device, generator=generator)))
    return torch.cat(parts, dim=1)


def mask_of_samples(ids: Tensor, lengths: Sequence[int], seed: int) -> Tensor:
    """The same for samples int64 [B, L, F], each from its own ids and the seed: whatever its batch, on every device."""
    uniform = torch.empty(len(ids), sum(1 + length for length in lengths))
    for row, sample in zip(uniform, ids.cpu().numpy(), strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(zlib.crc32(sample.tobytes(), seed)))
    pieces = uniform.split([1 + length for length in lengths], dim=1)
    return torch.cat([_part(piece[:, :1], piece[:, 1:]) for piece in pieces], dim=1).to(ids.device)


def _part(share: Tensor, noise: Tensor) -> Tensor:
    """bool [B, n] of one scale, from uniform numbers [B, 1] that say how many and [B, n] that say which."""
    count = (noise.shape[1] * (math.pi / 2 * share).cos()).ceil().clamp(min=1)
    return noise.argsort(1).argsort(1) < count


def still_open(open_: Tensor, confidence: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Which elements bool [B, n] are open after a round: of those that were, the least confident.

    ``confidence`` float64 [N] is that of the N open ones, ``wanted`` int64 [B] how many were open before the first
    round, ``share`` of the rounds is done. Every round decides one element or more, the last one all.
    """
    was_open, wanted = open_.to(confidence.device), wanted.to(confidence.device)
    known = torch.full(open_.shape, math.inf, dtype=torch.float64, device=confidence.device)
    known[was_open] = confidence
    count = (wanted.double() * math.cos(math.pi / 2 * share)).floor().long()
    count = torch.minimum(count, was_open.sum(1) - 1)
    return (known.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]).to(open_.device)
