"""Cosine mask schedule of MaskGIT (arXiv 2202.04200), for training and sampling.

A share cos(π/2 · u) of a scale's elements is masked. In training u is uniform; in sampling u is the share of finished
rounds, so early rounds decide few elements and late rounds many.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_ROUNDS = (8, 2, 1)
"""Default rounds of the first scales; later scales use the last value."""


def rounds_of(asked: Sequence[int], num_scales: int) -> list[int]:
    """Rounds of each scale; ``asked`` has one value, one per scale, or none for ``FIRST_ROUNDS``."""
    given = list(asked or FIRST_ROUNDS)
    return [given[min(number, len(given) - 1)] for number in range(num_scales)]


def random_mask(batch: int, lengths: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Random mask bool [B, sum of lengths]: at least one element of each scale, their number by the cosine schedule."""
    parts = []
    for length in lengths:
        share = torch.rand(batch, 1, device=device, generator=generator)
        parts.append(_part(share, torch.rand(batch, length, device=device, generator=generator)))
    return torch.cat(parts, dim=1)


def mask_of_samples(ids: Tensor, lengths: Sequence[int], seed: int) -> Tensor:
    """Like ``random_mask`` for samples int64 [B, L, F], but each sample's mask depends only on its ids and the seed.

    It is therefore the same in every batch and on every device.
    """
    uniform = torch.empty(len(ids), sum(1 + length for length in lengths))
    for row, sample in zip(uniform, ids.cpu().numpy(), strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(zlib.crc32(sample.tobytes(), seed)))
    pieces = uniform.split([1 + length for length in lengths], dim=1)
    return torch.cat([_part(piece[:, :1], piece[:, 1:]) for piece in pieces], dim=1).to(ids.device)


def _part(share: Tensor, noise: Tensor) -> Tensor:
    """Mask bool [B, n] of one scale; uniform numbers ``share`` [B, 1] set how many, ``noise`` [B, n] sets which."""
    count = (noise.shape[1] * (math.pi / 2 * share).cos()).ceil().clamp(min=1)
    return noise.argsort(1).argsort(1) < count


def still_open(open_: Tensor, confidence: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Elements bool [B, n] that stay open after a round: the least confident of the open ones.

    ``confidence`` float64 [N] belongs to the N open elements, ``wanted`` int64 [B] is the number of open elements
    before the first round, and ``share`` is the share of finished rounds. Each round decides at least one element; the
    last round decides all.
    """
    was_open, wanted = open_.to(confidence.device), wanted.to(confidence.device)
    confidences = torch.full(open_.shape, math.inf, dtype=torch.float64, device=confidence.device)
    confidences[was_open] = confidence
    count = (wanted.double() * math.cos(math.pi / 2 * share)).floor().long()
    count = torch.minimum(count, was_open.sum(1) - 1)
    return (confidences.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]).to(open_.device)
