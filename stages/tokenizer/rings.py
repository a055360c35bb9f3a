"""A direct path between tokens and the frequencies that are theirs.

Prefixes add rings of frequencies (those in a square and not in the one before). A token is told a few linear summaries
of its share of its ring, and may add to it in the decoded image. What is notable:

- the summaries are sums of weighted coefficients, each divided by its standard deviation over the data;
- a ring lies in the squares of its own and all later tokens, so prefixes stay what they are;
- tokens of one width have different shares: with one set of summaries for all of them most would be told the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.doubles import doubled
from stages.spectral.dct import dct_matrix


def count(numbers: Tensor, length: int) -> Tensor:
    """How often each of 0 … length - 1 is among ``numbers`` int64 [n]: int64 [length]."""
    return numbers.new_zeros(length).index_add(0, numbers, torch.ones_like(numbers))


def shares_of(widths: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(share of every frequency, int64 [H, W]; share of every token, int64 [N]): who has what, numbered from 0.

    A ring has the frequencies of one of the ``widths`` int64 [N], never falling, that the one below has not. Tokens of
    one width share its ring among them, each some neighbours by direction; where it has fewer frequencies than tokens,
    several have the same one.
    """
    rows, columns = torch.meshgrid(*[torch.arange(side, device=widths.device) for side in size], indexing="ij")
    # There may be as many rings as tokens; where widths are equal there are fewer, and the last ones are empty. Shapes
    # must not depend on the widths: a program of the tokenizer could not be exported.
    ring_of_token = functional.pad(widths.diff() > 0, (1, 0)).cumsum(0)
    tokens = count(ring_of_token, len(widths))
    # the last width is the longer side, so every frequency has a ring
    ring = ring_of_token[torch.searchsorted(widths, torch.maximum(rows, columns) + 1)].flatten()
    frequencies = count(ring, len(widths))
    shares = torch.minimum(tokens, frequencies)
    before = shares.cumsum(0) - shares
    order = torch.atan2(doubled(rows), doubled(columns)).flatten().argsort(stable=True).to(widths.device)
    order = order[ring[order].argsort(stable=True)]  # by ring, inside a ring by direction
    place = torch.empty_like(ring)
    place[order] = torch.arange(len(ring), device=widths.device)
    place = place - (frequencies.cumsum(0) - frequencies)[ring]
    of_frequency = before[ring] + place * shares[ring] // frequencies[ring]
    number = torch.arange(len(widths), device=widths.device) - (tokens.cumsum(0) - tokens)[ring_of_token]
    of_token = before[ring_of_token] + number * shares[ring_of_token] // tokens[ring_of_token]
    return of_frequency.view(size), of_token


class RingSummaries(nn.Module):
    """From frequencies to tokens: [B, C, H, W] pixels → [B, N, width], and back."""

    deviation: Tensor

    def __init__(self, num_tokens: int, summaries: int, width_in: int, width_out: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = shape
        self.register_buffer("deviation", torch.ones(height, width))
        self.gather = nn.Parameter(torch.randn(summaries, channels, height, width))
        self.tell = nn.Parameter(torch.randn(num_tokens, summaries, width_in) * summaries**-0.5)
        self.ask = nn.Parameter(torch.randn(num_tokens, width_out, summaries) * width_out**-0.5)
        self.spread = nn.Parameter(torch.randn(summaries, channels, height, width) * summaries**-0.5)

    def analyse(self, pixels: Tensor, widths: Tensor) -> Tensor:
        """What each token is told of its share: [B, N, width_in] of normalised pixels float32 [B, C, H, W]."""
        channels, height, width = self.gather.shape[1:]
        of_frequency, of_token = shares_of(widths, (height, width))
        coefficients = dct_matrix(height).to(pixels) @ pixels @ dct_matrix(width).to(pixels).T / self.deviation
        weighted = torch.einsum("bchw,kchw->bkhw", coefficients, self.gather).flatten(2)
        most = len(of_token)  # shares, or more
        sums = weighted.new_zeros(*weighted.shape[:2], most).index_add(2, of_frequency.flatten(), weighted)
        sizes = count(of_frequency.flatten(), most) * channels
        told = (sums / sizes.clamp(min=1) ** 0.5)[:, :, of_token]
        return torch.einsum("bkn,nkd->bnd", told, self.tell)

    def synthesise(self, features: Tensor, widths: Tensor) -> Tensor:
        """What tokens' features [B, n, width_out], n ≤ N, add to normalised pixels: float32 [B, C, H, W]."""
        channels, height, width = self.spread.shape[1:]
        of_frequency, of_token = shares_of(widths, (height, width))
        asked = torch.einsum("bnd,ndk->bkn", features.float(), self.ask[: features.shape[1]])
        strength = asked.new_zeros(*asked.shape[:2], len(of_token)).index_add(2, of_token[: features.shape[1]], asked)
        coefficients = torch.einsum("bkhw,kchw->bchw", strength[:, :, of_frequency], self.spread) * self.deviation
        return dct_matrix(height).to(coefficients).T @ coefficients @ dct_matrix(width).to(coefficients)
