"""A direct path between each nested token and its own frequencies.

Each prefix adds a ring of frequencies: those in its square but not in the previous square. A token receives a few
linear summaries of its share of the ring, and can add to these frequencies in the decoded image. Notes:

- Summaries are weighted sums of coefficients, each divided by its standard deviation over the data.
- The ring of a token is inside the squares of this and all later tokens, so prefixes do not depend on later tokens.
- Tokens of equal width have different shares of a ring; otherwise most of them would receive the same summaries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.doubles import doubled
from stages.spectral.dct import dct_matrix


def count(numbers: Tensor, length: int) -> Tensor:
    """Number of occurrences of each of 0 … length - 1 in ``numbers`` int64 [n]: int64 [length]."""
    return numbers.new_zeros(length).index_add(0, numbers, torch.ones_like(numbers))


def shares_of(widths: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(share of every frequency, int64 [H, W]; share of every token, int64 [N]), numbered from 0.

    ``widths`` int64 [N] never decrease. A ring contains the frequencies in the square of one width but not in the next
    smaller one. Tokens of equal width divide their ring by direction into shares of adjacent frequencies. If a ring has
    fewer frequencies than tokens, several tokens have the same share.
    """
    rows, columns = torch.meshgrid(*[torch.arange(side, device=widths.device) for side in size], indexing="ij")
    # Always allocate as many rings as tokens. With equal widths the last rings are empty. Shapes must not depend on the
    # widths, otherwise the tokenizer could not be exported as a program.
    ring_of_token = functional.pad(widths.diff() > 0, (1, 0)).cumsum(0)
    tokens = count(ring_of_token, len(widths))
    # the last width is the longer side, so every frequency has a ring
    ring = ring_of_token[torch.searchsorted(widths, torch.maximum(rows, columns) + 1)].flatten()
    frequencies = count(ring, len(widths))
    shares = torch.minimum(tokens, frequencies)
    first_share = shares.cumsum(0) - shares
    order = torch.atan2(doubled(rows), doubled(columns)).flatten().argsort(stable=True).to(widths.device)
    order = order[ring[order].argsort(stable=True)]  # by ring, inside a ring by direction
    rank = torch.empty_like(ring)
    rank[order] = torch.arange(len(ring), device=widths.device)
    rank = rank - (frequencies.cumsum(0) - frequencies)[ring]
    share_of_frequency = first_share[ring] + rank * shares[ring] // frequencies[ring]
    number = torch.arange(len(widths), device=widths.device) - (tokens.cumsum(0) - tokens)[ring_of_token]
    share_of_token = first_share[ring_of_token] + number * shares[ring_of_token] // tokens[ring_of_token]
    return share_of_frequency.view(size), share_of_token


class RingSummaries(nn.Module):
    """Linear maps from frequencies to tokens and back: pixels [B, C, H, W] ↔ [B, N, width]."""

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
        """Summaries for each token: [B, N, width_in] from normalized pixels float32 [B, C, H, W]."""
        channels, height, width = self.gather.shape[1:]
        share_of_frequency, share_of_token = shares_of(widths, (height, width))
        coefficients = dct_matrix(height).to(pixels) @ pixels @ dct_matrix(width).to(pixels).T / self.deviation
        weighted = torch.einsum("bchw,kchw->bkhw", coefficients, self.gather).flatten(2)
        max_shares = len(share_of_token)  # upper bound of the number of shares
        sums = weighted.new_zeros(*weighted.shape[:2], max_shares).index_add(2, share_of_frequency.flatten(), weighted)
        sizes = count(share_of_frequency.flatten(), max_shares) * channels
        summaries = (sums / sizes.clamp(min=1) ** 0.5)[:, :, share_of_token]
        return torch.einsum("bkn,nkd->bnd", summaries, self.tell)

    def synthesise(self, features: Tensor, widths: Tensor) -> Tensor:
        """Contribution of token features [B, n, width_out], n ≤ N, to normalized pixels: float32 [B, C, H, W]."""
        channels, height, width = self.spread.shape[1:]
        share_of_frequency, share_of_token = shares_of(widths, (height, width))
        strength_of_token = torch.einsum("bnd,ndk->bkn", features.float(), self.ask[: features.shape[1]])
        strength_of_share = strength_of_token.new_zeros(*strength_of_token.shape[:2], len(share_of_token)).index_add(
            2, share_of_token[: features.shape[1]], strength_of_token
        )
        coefficients = (
            torch.einsum("bkhw,kchw->bchw", strength_of_share[:, :, share_of_frequency], self.spread) * self.deviation
        )
        return dct_matrix(height).to(coefficients).T @ coefficients @ dct_matrix(width).to(coefficients)
