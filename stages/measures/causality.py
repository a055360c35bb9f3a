"""Is this a good order? How far a token follows from those before it: linearly from their codes, and for the prior.

SpectralAR (arXiv 2506.10962) argues by the R² of such a regression that its tokens suit an autoregressive prior.
What is notable here:

- R² is measured on images that neither the regression nor the choice of its ridge has seen;
- the control predicts from the tokens of another image: what it reaches above 0 is chance, not order;
- the same tokens are measured from the last to the first too: how much of it is order, and how much any correlation;
- one factorisation serves all positions, for the first tokens' normal equations are the first rows of all tokens'.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data.layout import Tokens

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties to choose from, for inputs of variance 1."""
FEWEST_IMAGES = 64
"""Below this many images nothing is measured."""
MOST_INPUTS = 2048
"""Above this many numbers in all codes of an image nothing is measured: the time grows with their cube."""


@runtime_checkable
class HasCodes(Protocol):
    """A tokenizer whose ids stand for vectors."""

    def codes(self, tokens: Tokens) -> Tensor:
        """float32 [B, L, D]: the code of each token, as the quantiser has it."""


@torch.inference_mode()
def measure_causality(
    tokenizer: Any, tokens: Tokens, others: dict[str, list[int]] | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """R² of every token's code given the tokens before it, forwards and backwards, with the shuffled control.

    ``others`` are more orders by name, each a permutation of the elements.

    Too few images for the many inputs of long codes lower it; ``too_few_images`` says where they are less than four an
    input. None where ids stand for no vectors, for fewer than ``FEWEST_IMAGES`` images, and above ``MOST_INPUTS``.
    """
    if not isinstance(tokenizer, HasCodes) or len(tokens) < FEWEST_IMAGES:
        return None
    if tokenizer.codes(tokens[:1].to(next(tokenizer.parameters()).device)).numel() > MOST_INPUTS:  # type: ignore[attr-defined]
        return None
    device = next(tokenizer.parameters()).device  # type: ignore[attr-defined]
    codes = torch.cat([tokenizer.codes(part.to(device)).cpu() for part in tokens.split(256)]).double()
    shuffled = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    parts = split_of(len(codes))
    entry: dict[str, Any] = {
        "num_fitted": parts[0],
        "num_measured": parts[2],
        "tokens": codes.shape[1],
        "code_width": codes.shape[2],
        "too_few_images": parts[0] < 4 * codes.shape[1] * codes.shape[2],
    }
    orders = {"natural": codes, "reversed": codes.flip(1)}
    for name, ordered in (orders | {name: codes[:, order] for name, order in (others or {}).items()}).items():
        found, control = predictability(ordered, ordered), predictability(ordered[shuffled], ordered)
        entry[name] = {
            "mean_r2": sum(found) / max(1, len(found)),
            "mean_r2_shuffled": sum(control) / max(1, len(control)),
            "r2": found,
            "r2_shuffled": control,
        }
    return entry


def predictability(earlier: Tensor, codes: Tensor) -> list[float]:
    """Held-out R² of ``codes`` [n, L, D] at positions 1 … L - 1, by ridge regression on all ``earlier`` [n, L, D] ones.

    Half of the images fit, a quarter chooses the ridge of each position, the rest is measured. 0 is as good as the mean
    code; a token that never changes has 0.
    """
    count, length, width = codes.shape
    parts = split_of(count)
    given = [part.flatten(1) for part in _standardised(earlier, parts[0]).split(parts)]
    wanted = [part.flatten(1) for part in _centred(codes, parts[0]).split(parts)]
    gram = given[0].T @ given[0] / parts[0]
    moments = given[0].T @ wanted[0] / parts[0]
    factors = [torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype)) for ridge in RIDGES]
    found = []
    for position in range(1, length):
        known, own = position * width, slice(position * width, (position + 1) * width)
        errors, variance = [], [part[:, own].square().sum() for part in wanted]
        for factor in factors:
            weights = torch.cholesky_solve(moments[:known, own], factor[:known, :known])
            errors.append(
                [(x[:, :known] @ weights - y[:, own]).square().sum() for x, y in zip(given, wanted, strict=True)]
            )
        chosen = min(errors, key=lambda error: float(error[1]))
        found.append(0.0 if float(variance[2]) == 0 else 1 - float(chosen[2] / variance[2]))
    return found


def split_of(count: int) -> tuple[int, int, int]:
    """How many of ``count`` images fit, how many choose the ridge, how many are measured."""
    return count // 2, count // 4, count - count // 2 - count // 4


def _centred(codes: Tensor, first: int) -> Tensor:
    """Codes less the mean of the first images."""
    return codes - codes[:first].mean(0)


def _standardised(codes: Tensor, first: int) -> Tensor:
    """Codes of mean 0 and variance 1 over the first images; what never changes there is 0."""
    centred = _centred(codes, first)
    spread = centred[:first].square().mean(0).sqrt()
    return torch.where(spread > 1e-6, centred / spread.clamp_min(1e-6), 0)
