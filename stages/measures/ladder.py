"""The ladder of resolutions: one tokenizer used at the size of each of its scales, as if it were trained for that size.

What is notable here:

- for the agreement of tokens small images stay floats, as the tokenizer's own averaging gives them; on the rungs both
  tokenizers get the same 8-bit images;
- every rung stands beside a baseline that knows one size only: it gets the small image enlarged, and its result is
  reduced again;
- a mismatch between a small image's tokens and the first tokens of the large one is no error where two choices tie:
  sequences of different length round differently.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from data.images.views import to_float, to_uint8
from data.layout import TokenLayout, Tokens
from stages.contract import Tokenizer
from stages.measures.codes import code_use
from stages.measures.rate import rates, total_rate
from stages.measures.reconstruction import Judge, Reconstructed, measure_distortion, reconstruct
from stages.measures.upsampling import enlarge, reduce_to

TIE = 1e-5
"""Margin below which two choices of a token tie: some ten roundings of float32 at the size of what is compared."""


@runtime_checkable
class HasMargins(Protocol):
    """A tokenizer that can say how close its choices were."""

    def margins(self, pixels: Tensor) -> Tensor:
        """float32 [B, L]: how far each token of pixels [B, C, h, w] is from another choice."""


@torch.inference_mode()
def measure_agreement(
    tokenizer: Tokenizer, pixels: Tensor, full: Tokens, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Do small images give the first tokens of the large ones? Every rung but the last, all positions together.

    ``full`` are the tokens of the uint8 ``pixels`` [N, C, H, W], encoded in the same batches. A mismatch is a tie where
    its margin, the larger one of both encodings, is under ``TIE``; None where the tokenizer does not know its margins.
    """
    layout = tokenizer.layout
    margins_of = tokenizer.margins if isinstance(tokenizer, HasMargins) else None
    positions, margins, mismatches = 0, [torch.empty(0)], 0
    for images, ids in zip(pixels.split(batch_size), full.ids.split(batch_size), strict=True):
        large = to_float(images.to(device))
        for num_scales in sorted(layout.rungs.values())[:-1]:
            small = tokenizer.reference(large, num_scales)
            found = tokenizer.encode(small).ids.cpu()
            wrong = (found != ids[:, : found.shape[1]]).any(-1)
            positions += wrong.numel()
            mismatches += int(wrong.sum())
            if margins_of is not None and wrong.any():
                larger = torch.maximum(margins_of(small), margins_of(large)[:, : wrong.shape[1]])
                margins.append(larger.cpu()[wrong])
    measured = torch.cat(margins)
    return {
        "positions": positions,
        "agreeing_share": 1 - mismatches / positions,
        "mismatches": mismatches,
        "mismatches_that_are_ties": int((measured < TIE).sum()) if margins_of is not None else None,
        "largest_margin_of_a_mismatch": float(measured.max()) if len(measured) else None,
        "tie_below": TIE,
    }


@dataclass(frozen=True)
class Contender:
    """A tokenizer to be measured at every rung, with the judge that knows what it was trained against."""

    tokenizer: Tokenizer
    judge: Judge | None


def pass_through(tokenizer: Tokenizer, pixels: Tensor, batch_size: int, device: torch.device) -> Reconstructed:
    """Encode and decode uint8 ``pixels`` [N, C, h, w]; the seconds leave out a warm-up."""
    reconstruct(tokenizer, pixels[:1], batch_size, device)
    return reconstruct(tokenizer, pixels, batch_size, device)


@torch.inference_mode()
def measure_rung(
    own: Contender, baseline: Contender | None, pixels: Tensor, num_scales: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Both tokenizers on uint8 ``pixels`` [N, C, H, W], reduced to the size that ``num_scales`` scales decode to."""
    parts = (own.tokenizer.reference(to_float(part.to(device)), num_scales) for part in pixels.split(batch_size))
    wanted = torch.cat([to_uint8(part).cpu() for part in parts])
    height, width = own.tokenizer.layout.scales[num_scales - 1].image_size
    measured: dict[str, Any] = {
        "num_scales": num_scales,
        "image_size": [height, width],
        "tokenizer": columns(own, wanted, pass_through(own.tokenizer, wanted, batch_size, device)),
    }
    if baseline is None:
        return measured
    large = torch.cat([enlarge(part, pixels.shape[-1]) for part in wanted.split(batch_size)])
    made = pass_through(baseline.tokenizer, large, batch_size, device)
    made = replace(made, pixels=reduce_to(made.pixels, height))
    measured["baseline"] = columns(baseline, wanted, made)
    measured["better"] = better(measured["tokenizer"], measured["baseline"])
    return measured


def columns(contender: Contender, wanted: Tensor, made: Reconstructed) -> dict[str, Any]:
    """What one tokenizer costs and gives at one rung; bits are for each pixel of uint8 ``wanted`` [N, C, h, w]."""
    layout = contender.tokenizer.layout
    scales = rates(code_use(made.tokens, layout), len(wanted), layout)
    return {
        **total_rate(scales, wanted.shape[-1] * wanted.shape[-2]),
        "images_per_second": len(wanted) / (made.encode_seconds + made.decode_seconds),
        **measure_distortion(wanted, made.pixels, contender.judge, "the same images reduced by averaging"),
    }


def better(own: dict[str, Any], baseline: dict[str, Any]) -> dict[str, str]:
    """Who wins in each measure that both have: tokenizer, baseline or equal."""

    def winner(lead: float) -> str:
        return "tokenizer" if lead > 0 else "baseline" if lead < 0 else "equal"

    found = {"psnr": winner(own["psnr_mean_of_images"] - baseline["psnr_mean_of_images"])}
    for key, value in (("perceptual_lite0", "mean"), ("fd_lite0", "value")):
        if key in own and key in baseline:
            found[key] = winner(baseline[key][value] - own[key][value])
    return found


def time_interleaved(tasks: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every run of every task. All run once untimed, then in turn, so that a slow minute meets all of them.

    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats; a time needs one or more")
    for task in tasks:
        task()
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, found in zip(tasks, seconds, strict=True):
            started = time.perf_counter()
            task()
            found.append(time.perf_counter() - started)
    return seconds


def measure_sampling_time(draw: Callable[[int], object], layout: TokenLayout, repeats: int) -> list[dict[str, Any]]:
    """Median time of ``draw(k)``, which samples the first k scales' tokens, beside the share of tokens, for every k.

    ``time_over_tokens`` is the share of the full time over the share of tokens: 1 where time grows like the tokens.
    """
    rungs = range(1, len(layout.scales) + 1)
    runs = time_interleaved([lambda k=k: draw(k) for k in rungs], repeats)  # type: ignore[misc]
    medians = [statistics.median(seconds) for seconds in runs]
    found = []
    for num_scales, seconds, median in zip(rungs, runs, medians, strict=True):
        length = layout.prefix_length(num_scales)
        time_share, token_share = median / medians[-1], length / layout.length
        found.append(
            {
                "num_scales": num_scales,
                "image_size": list(layout.scales[num_scales - 1].image_size),
                "tokens": length,
                "seconds": median,
                "fastest_and_slowest": [min(seconds), max(seconds)],
                "share_of_full_time": time_share,
                "share_of_tokens": token_share,
                "time_over_tokens": time_share / token_share,
            }
        )
    return found
