"""Measures of streams: their length, the bits that their grammar saves, and the rate of every prefix of scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data.layout import Tokens
from stages.contract import Prior, Prompts
from stages.grammar import Grammar


def uniform_bits(grammar: Grammar, tokens: Tokens, strict: bool) -> Tensor:
    """Bits of each element if all allowed ids of each field are equally likely: float64 [B, L]."""
    assert tokens.notes is not None
    fields = range(tokens.ids.shape[2])
    masks = (grammar.allowed(tokens.notes, tokens.ids[..., :field], strict) for field in fields)
    return torch.stack([mask.sum(-1).double().log2() for mask in masks]).sum(0)


@torch.inference_mode()
def measure_streams(
    grammar: Grammar,
    num_scales: int,
    tokens: Tokens,
    header_bits: Tensor,
    batch_size: int,
    prior: Prior | None,
    prompts: Prompts | None,
) -> dict[str, Any]:
    """Mean cost of streams, in bits per image and per scale; ``tokens`` are on the CPU.

    - ``uniform``: bits if all allowed ids are equally likely;
    - ``prior``: bits under the prior with these prompts, on its device. None from the first scale that the prior's
      ``max_length`` truncates in any stream;
    - ``saved``: extra bits if ids ruled out only by earlier elements were allowed;
    - ``illegal_probability``: mean probability that the network gives to forbidden ids.

    ``header_bits`` [N] are included in everything but ``scales``.
    """
    kinds = ["tokens", "uniform", "uniform_saved"]
    kinds += [] if prior is None else ["modelled", "prior", "prior_saved", "illegal"]
    sums = {kind: torch.zeros(num_scales, dtype=torch.float64) for kind in kinds}
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        part.notes = grammar.annotate(part)
        strict, loose = (uniform_bits(grammar, part, known) for known in (True, False))
        values = {"tokens": torch.ones_like(strict), "uniform": strict, "uniform_saved": loose - strict}
        if prior is not None and prompts is not None:
            device = next(prior.parameters()).device
            output = prior(part.to(device), prompts[start : start + batch_size].to(device))
            assert output.illegal is not None and output.saved is not None
            nats_by_kind = {"prior": output.nll.sum(-1), "prior_saved": output.saved}
            values |= {kind: nats.cpu().double() / math.log(2) for kind, nats in nats_by_kind.items()}
            values |= {"illegal": output.illegal.cpu().double(), "modelled": torch.ones(output.illegal.shape).double()}
        for kind, per_element in values.items():
            width = per_element.shape[1]
            numbers = grammar.scales(part)[:, :width]
            sums[kind].index_add_(0, numbers.flatten(), (per_element * part.counted[:, :width]).flatten())
    means = {kind: total / len(tokens) for kind, total in sums.items()}
    header = float(header_bits.mean())
    scales: list[dict[str, float | None]] = [
        {kind: float(means[kind][number]) for kind in kinds if kind in ("tokens", "uniform", "prior")}
        for number in range(num_scales)
    ]
    measured: dict[str, Any] = {
        "mean_length": float(tokens.lengths.double().mean()),
        "longest": int(tokens.lengths.max()),
        "header_bits": header,
        "uniform_bits": header + float(means["uniform"].sum()),
        "uniform_bits_saved": float(means["uniform_saved"].sum()),
        "prefixes": [
            {"tokens": float(count), "uniform_bits": header + float(uniform)}
            for count, uniform in zip(means["tokens"].cumsum(0), means["uniform"].cumsum(0), strict=True)
        ],
        "scales": scales,
    }
    if prior is not None:
        complete = (sums["modelled"] == sums["tokens"]).cumprod(0).bool()
        is_rate = complete.clone()
        if prior.order != "natural":
            is_rate[:-1] = False  # finer scales may come first, so these costs are no rate of the first scales
        for entry, scale, bits_, kept in zip(
            measured["prefixes"], scales, means["prior"].cumsum(0).tolist(), complete.tolist(), strict=True
        ):
            scale["prior"] = scale["prior"] if kept else None
            entry["prior_bits"] = header + bits_ if kept else None
        for entry, kept in zip(measured["prefixes"], is_rate.tolist(), strict=True):
            entry["prior_bits"] = entry["prior_bits"] if kept else None
        measured |= {
            "cut_share": float((tokens.lengths > prior.max_length).double().mean()),
            "prior_bits": measured["prefixes"][-1]["prior_bits"],
            "prior_bits_saved": float(means["prior_saved"].sum()),
            "illegal_probability": float(sums["illegal"].sum() / sums["modelled"].sum().clamp(min=1)),
        }
    return measured
