"""How well a linear regression on the codes of the preceding tokens predicts each token: a test of the token order.

SpectralAR (arXiv 2506.10962) uses the R² of such a regression to argue that its tokens suit an autoregressive prior.
Design notes:

- R² is measured on images that are used neither for the regression nor for the choice of its ridge;
- a control predicts from the tokens of another image; any control R² above 0 is due to chance, not to order;
- the reversed order is measured too, which separates the effect of the order from correlation in general;
- one factorization serves all positions, as the normal equations of the first tokens are a leading block of the full
  ones.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data.layout import Tokens

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties to choose from, for inputs of variance 1."""
FEWEST_IMAGES = 64
"""Minimum number of images; with fewer, nothing is measured."""
MOST_INPUTS = 2048
"""Maximum number of values in the codes of an image; with more, nothing is measured, as time grows with their cube."""


@runtime_checkable
class HasCodes(Protocol):
    """A tokenizer whose ids represent vectors."""

    def codes(self, tokens: Tokens) -> Tensor:
        """Code of each token as in the quantizer, float32 [B, L, D]."""


@torch.inference_mode()
def measure_causality(
    tokenizer: Any, tokens: Tokens, others: dict[str, list[int]] | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """R² of each token's code given the tokens before it, in natural and reversed order, with a shuffled control.

    ``others`` maps names to further orders, each a permutation of the elements.

    R² is too low if there are few images for the number of regression inputs; ``too_few_images`` is True for fewer than
    four images per input. Returns None if ids do not represent vectors, for fewer than ``FEWEST_IMAGES`` images, and
    for more than ``MOST_INPUTS`` inputs.
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
        r2, control = predictability(ordered, ordered), predictability(ordered[shuffled], ordered)
        entry[name] = {
            "mean_r2": sum(r2) / max(1, len(r2)),
            "mean_r2_shuffled": sum(control) / max(1, len(control)),
            "r2": r2,
            "r2_shuffled": control,
        }
    return entry


def predictability(earlier: Tensor, codes: Tensor) -> list[float]:
    """Held-out R² of ``codes`` [n, L, D] at positions 1 … L - 1, by ridge regression on ``earlier`` [n, L, D].

    Each position is predicted from all positions of ``earlier`` before it. Half of the images fit the regression, a
    quarter selects the ridge of each position, the rest is measured. 0 is as good as predicting the mean code; a
    constant token has 0.
    """
    count, length, width = codes.shape
    parts = split_of(count)
    inputs = [part.flatten(1) for part in _standardised(earlier, parts[0]).split(parts)]
    targets = [part.flatten(1) for part in _centred(codes, parts[0]).split(parts)]
    gram = inputs[0].T @ inputs[0] / parts[0]
    moments = inputs[0].T @ targets[0] / parts[0]
    factors = [torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype)) for ridge in RIDGES]
    scores = []
    for position in range(1, length):
        num_inputs, columns = position * width, slice(position * width, (position + 1) * width)
        errors, variance = [], [part[:, columns].square().sum() for part in targets]
        for factor in factors:
            weights = torch.cholesky_solve(moments[:num_inputs, columns], factor[:num_inputs, :num_inputs])
            errors.append(
                [
                    (x[:, :num_inputs] @ weights - y[:, columns]).square().sum()
                    for x, y in zip(inputs, targets, strict=True)
                ]
            )
        best_errors = min(errors, key=lambda error: float(error[1]))
        scores.append(0.0 if float(variance[2]) == 0 else 1 - float(best_errors[2] / variance[2]))
    return scores


def split_of(count: int) -> tuple[int, int, int]:
    """Numbers of images, out of ``count``, that (fit, select the ridge, are measured)."""
    return count // 2, count // 4, count - count // 2 - count // 4


def _centred(codes: Tensor, first: int) -> Tensor:
    """Codes minus their mean over the ``first`` images."""
    return codes - codes[:first].mean(0)


def _standardised(codes: Tensor, first: int) -> Tensor:
    """Codes scaled to mean 0 and variance 1 over the ``first`` images; values that are constant there become 0."""
    centred = _centred(codes, first)
    spread = centred[:first].square().mean(0).sqrt()
    return torch.where(spread > 1e-6, centred / spread.clamp_min(1e-6), 0)
