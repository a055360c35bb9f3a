"""Resolution ladder: one tokenizer used at the size of each of its scales (a rung), without retraining.

Design notes:

- to compare tokens across sizes, small images stay floats as the tokenizer's own averaging returns them; to measure
  rungs, both tokenizers get the same 8-bit images;
- every rung is compared with a baseline tokenizer that supports one size only: the small image is enlarged for it, and
  its result is reduced again;
- a mismatch between a small image's tokens and the first tokens of the large image is not an error if two choices tie,
  as sequences of different length round differently.
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
"""Margin below which two choices of a token tie: about ten float32 rounding errors at the scale of compared values."""


@runtime_checkable
class HasMargins(Protocol):
    """A tokenizer that reports the margins of its choices."""

    def margins(self, pixels: Tensor) -> Tensor:
        """Margin of each token of pixels [B, C, h, w] to the next-best choice: float32 [B, L]."""


@torch.inference_mode()
def measure_agreement(
    tokenizer: Tokenizer, pixels: Tensor, full: Tokens, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Agreement of the tokens of small images with the first tokens of the large images.

    It counts all positions of every rung but the last. ``full`` are the tokens of the uint8 ``pixels`` [N, C, H, W],
    encoded in the same batches. A mismatch is a tie if its margin (the larger one of both encodings) is below ``TIE``;
    the number of ties is None if the tokenizer does not report margins.
    """
    layout = tokenizer.layout
    margins_of = tokenizer.margins if isinstance(tokenizer, HasMargins) else None
    positions, margins, mismatches = 0, [torch.empty(0)], 0
    for images, ids in zip(pixels.split(batch_size), full.ids.split(batch_size), strict=True):
        large = to_float(images.to(device))
        for num_scales in sorted(layout.rungs.values())[:-1]:
            small = tokenizer.reference(large, num_scales)
            small_ids = tokenizer.encode(small).ids.cpu()
            mismatch = (small_ids != ids[:, : small_ids.shape[1]]).any(-1)
            positions += mismatch.numel()
            mismatches += int(mismatch.sum())
            if margins_of is not None and mismatch.any():
                larger = torch.maximum(margins_of(small), margins_of(large)[:, : mismatch.shape[1]])
                margins.append(larger.cpu()[mismatch])
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
    """A tokenizer to measure at every rung, with a judge that records whether the tokenizer was trained against it."""

    tokenizer: Tokenizer
    judge: Judge | None


def pass_through(tokenizer: Tokenizer, pixels: Tensor, batch_size: int, device: torch.device) -> Reconstructed:
    """Encode and decode uint8 ``pixels`` [N, C, h, w]; the measured seconds exclude a warm-up pass."""
    reconstruct(tokenizer, pixels[:1], batch_size, device)
    return reconstruct(tokenizer, pixels, batch_size, device)


@torch.inference_mode()
def measure_rung(
    own: Contender, baseline: Contender | None, pixels: Tensor, num_scales: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Measure both tokenizers on uint8 ``pixels`` [N, C, H, W], reduced to the size that ``num_scales`` decode to."""
    parts = (own.tokenizer.reference(to_float(part.to(device)), num_scales) for part in pixels.split(batch_size))
    small = torch.cat([to_uint8(part).cpu() for part in parts])
    height, width = own.tokenizer.layout.scales[num_scales - 1].image_size
    measured: dict[str, Any] = {
        "num_scales": num_scales,
        "image_size": [height, width],
        "tokenizer": columns(own, small, pass_through(own.tokenizer, small, batch_size, device)),
    }
    if baseline is None:
        return measured
    large = torch.cat([enlarge(part, pixels.shape[-1]) for part in small.split(batch_size)])
    reconstructed = pass_through(baseline.tokenizer, large, batch_size, device)
    reconstructed = replace(reconstructed, pixels=reduce_to(reconstructed.pixels, height))
    measured["baseline"] = columns(baseline, small, reconstructed)
    measured["better"] = better(measured["tokenizer"], measured["baseline"])
    return measured


def columns(contender: Contender, wanted: Tensor, made: Reconstructed) -> dict[str, Any]:
    """Rate (bits per pixel), speed and distortion of one tokenizer at one rung, for uint8 ``wanted`` [N, C, h, w]."""
    layout = contender.tokenizer.layout
    scales = rates(code_use(made.tokens, layout), len(wanted), layout)
    return {
        **total_rate(scales, wanted.shape[-1] * wanted.shape[-2]),
        "images_per_second": len(wanted) / (made.encode_seconds + made.decode_seconds),
        **measure_distortion(wanted, made.pixels, contender.judge, "the same images reduced by averaging"),
    }


def better(own: dict[str, Any], baseline: dict[str, Any]) -> dict[str, str]:
    """The winner in each measure that both entries have: tokenizer, baseline or equal."""

    def winner(lead: float) -> str:
        return "tokenizer" if lead > 0 else "baseline" if lead < 0 else "equal"

    winners = {"psnr": winner(own["psnr_mean_of_images"] - baseline["psnr_mean_of_images"])}
    for key, value in (("perceptual_lite0", "mean"), ("fd_lite0", "value")):
        if key in own and key in baseline:
            winners[key] = winner(baseline[key][value] - own[key][value])
    return winners


def time_interleaved(tasks: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every run of every task: one list per task.

    After one untimed run each, the tasks take turns, so that a slow phase of the machine affects all of them.
    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats; allowed: 1 or more")
    for task in tasks:
        task()
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, task_seconds in zip(tasks, seconds, strict=True):
            started = time.perf_counter()
            task()
            task_seconds.append(time.perf_counter() - started)
    return seconds


def measure_sampling_time(draw: Callable[[int], object], layout: TokenLayout, repeats: int) -> list[dict[str, Any]]:
    """Median time of ``draw(k)``, which samples the tokens of the first k scales, and its share of tokens, for every k.

    ``time_over_tokens`` is the share of the full time divided by the share of tokens; it is 1 if time is proportional
    to the number of tokens.
    """
    rungs = range(1, len(layout.scales) + 1)
    runs = time_interleaved([lambda k=k: draw(k) for k in rungs], repeats)  # type: ignore[misc]
    medians = [statistics.median(seconds) for seconds in runs]
    entries = []
    for num_scales, seconds, median in zip(rungs, runs, medians, strict=True):
        length = layout.prefix_length(num_scales)
        time_share, token_share = median / medians[-1], length / layout.length
        entries.append(
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
    return entries
