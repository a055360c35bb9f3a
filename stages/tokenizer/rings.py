"""A direct path between tokens and the frequencies that are theirs.

A token whose prefix adds a ring of frequencies (those in its square and not in the square before) is told a few linear
summaries of this ring, and may add to it in the decoded image. Tokens of one square share its ring. What is notable:

- the summaries are sums of weighted coefficients, each divided by its standard deviation over the data;
- a ring lies in the squares of its own and all later tokens, so prefixes stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.spectral.dct import dct_matrix


def rings_of(widths: Tensor, size: tuple[int, int]) -> Tensor:
    """The ring of every frequency, int64 [H, W]: the number of different ``widths`` that do not reach to it.

    Where the last width is the longer side every frequency has one.
    """
    rows, columns = (torch.arange(side, device=widths.device) for side in size)
    reach = torch.maximum(rows[:, None], columns) + 1
    return torch.searchsorted(widths.unique(), reach)


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
        """What each token is told of its ring: [B, N, width_in] of normalised pixels float32 [B, C, H, W]."""
        channels, height, width = self.gather.shape[1:]
        rings, of_token = rings_of(widths, (height, width)).flatten(), self._of_tokens(widths)
        coefficients = dct_matrix(height).to(pixels) @ pixels @ dct_matrix(width).to(pixels).T / self.deviation
        weighted = (coefficients.unsqueeze(1) * self.gather).sum(2).flatten(2)  # [B, summaries, H · W]
        count = int(of_token.max()) + 1
        sums = weighted.new_zeros(*weighted.shape[:2], count).index_add(2, rings, weighted)
        sizes = torch.bincount(rings, minlength=count) * channels
        told = (sums / sizes.clamp(min=1) ** 0.5)[:, :, of_token]
        return torch.einsum("bkn,nkd->bnd", told, self.tell)

    def synthesise(self, features: Tensor, widths: Tensor) -> Tensor:
        """What tokens' features [B, n, width_out], n ≤ N, add to normalised pixels: float32 [B, C, H, W]."""
        channels, height, width = self.spread.shape[1:]
        rings, of_token = rings_of(widths, (height, width)), self._of_tokens(widths)[: features.shape[1]]
        asked = torch.einsum("bnd,ndk->bkn", features.float(), self.ask[: features.shape[1]])
        strength = asked.new_zeros(*asked.shape[:2], int(rings.max()) + 1).index_add(2, of_token, asked)
        coefficients = (strength[:, :, rings].unsqueeze(2) * self.spread).sum(1) * self.deviation
        return dct_matrix(height).to(coefficients).T @ coefficients @ dct_matrix(width).to(coefficients)

    @staticmethod
    def _of_tokens(widths: Tensor) -> Tensor:
        """The ring of each token, int64 [N]."""
        return widths.unique(return_inverse=True)[1]
