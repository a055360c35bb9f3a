"""Streams measured: how long they are, what their grammar saves, and the rate of every beginning of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data.layout import Tokens
from stages.contract import Prior, Prompts
from stages.grammar import Grammar


def uniform_bits(grammar: Grammar, tokens: Tokens, strict: bool) -> Tensor:
    """float64 [B, L]: bits of each element where all ids that may come are as likely, field by field."""
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
    """Mean cost of streams on the CPU, in bits an image, scale by scale.

    ``uniform``: every id that may come is as likely. ``prior``: under a prior with these prompts, on its device; None
    from the first scale on of which the prior's ``max_length`` cuts anything. ``saved`` is what ids would cost besides
    if those were allowed which only the elements before make impossible. ``header_bits`` [N] are counted in all but
    ``scales``. ``illegal_probability`` is what the network gives, on average, to ids that cannot come.
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
            bits = {"prior": output.nll.sum(-1), "prior_saved": output.saved}
            values |= {kind: each.cpu().double() / math.log(2) for kind, each in bits.items()}
            values |= {"illegal": output.illegal.cpu().double(), "modelled": torch.ones(output.illegal.shape).double()}
        for kind, each in values.items():
            width = each.shape[1]
            numbers = grammar.scales(part)[:, :width]
            sums[kind].index_add_(0, numbers.flatten(), (each * part.counted[:, :width]).flatten())
    means = {kind: each / len(tokens) for kind, each in sums.items()}
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
        whole = (sums["modelled"] == sums["tokens"]).cumprod(0).bool()
        alone = whole.clone()
        if prior.order != "natural":
            alone[:-1] = False  # what such a scale costs, given others that are finer, is no rate of the first scales
        for entry, scale, bits_, kept in zip(
            measured["prefixes"], scales, means["prior"].cumsum(0).tolist(), whole.tolist(), strict=True
        ):
            scale["prior"] = scale["prior"] if kept else None
            entry["prior_bits"] = header + bits_ if kept else None
        for entry, kept in zip(measured["prefixes"], alone.tolist(), strict=True):
            entry["prior_bits"] = entry["prior_bits"] if kept else None
        measured |= {
            "cut_share": float((tokens.lengths > prior.max_length).double().mean()),
            "prior_bits": measured["prefixes"][-1]["prior_bits"],
            "prior_bits_saved": float(means["prior_saved"].sum()),
            "illegal_probability": float(sums["illegal"].sum() / sums["modelled"].sum().clamp(min=1)),
        }
    return measured
