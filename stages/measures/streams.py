"""Streams measured: how long they are, what their grammar saves, and the rate of every beginning of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data.layout import Tokens
from stages.contract import Grammar, Prior, Prompts


@torch.inference_mode()
def measure_streams(
    grammar: Grammar, tokens: Tokens, header_bits: Tensor, batch_size: int, prior: Prior | None, prompts: Prompts | None
) -> dict[str, Any]:
    """Mean cost of streams on the CPU, in bits an image, scale by scale with all before it.

    ``uniform``: every id that may come is as likely. ``prior``: under a prior with these prompts, on its device. Both
    count ``header_bits`` [N] and nothing for what must come; ``saved`` is what ids would cost besides if those were not
    ruled out which only the elements before make impossible. ``illegal_probability`` is what the network gives, on
    average, to ids that cannot come.
    """
    scales = (
        len(prior.layout.scales) if prior is not None else int(grammar.scale_of(grammar.annotate(tokens)).max()) + 1
    )
    kinds = ("tokens", "uniform", "uniform_saved") + (("prior", "prior_saved", "illegal") if prior is not None else ())
    sums = {kind: torch.zeros(scales, dtype=torch.float64) for kind in kinds}
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        part.notes = grammar.annotate(part)
        strict, loose = (grammar.allowed(part.notes, known).sum(-1).double().log2() for known in (True, False))
        values = {"tokens": part.counted.double(), "uniform": strict, "uniform_saved": loose - strict}
        if prior is not None and prompts is not None:
            device = next(prior.parameters()).device
            output = prior(part.to(device), prompts[start : start + batch_size].to(device))
            assert output.illegal is not None and output.saved is not None
            found = {"prior": output.nll[..., 0], "prior_saved": output.saved, "illegal": output.illegal}
            values |= {
                kind: each.double().cpu() / (1 if kind == "illegal" else math.log(2)) for kind, each in found.items()
            }
        numbers = grammar.scale_of(part.notes)
        for kind, each in values.items():
            each = each * part.counted[:, : each.shape[1]]
            sums[kind].index_add_(0, numbers[:, : each.shape[1]].flatten(), each.flatten())
    means = {kind: each / len(tokens) for kind, each in sums.items()}
    header = float(header_bits.mean())
    measured: dict[str, Any] = {
        "mean_length": float(tokens.lengths.double().mean()),
        "longest": int(tokens.lengths.max()),
        "header_bits": header,
        "uniform_bits": header + float(means["uniform"].sum()),
        "uniform_bits_saved": float(means["uniform_saved"].sum()),
        "prefixes": [
            {"tokens": float(tokens_), "uniform_bits": header + float(uniform)}
            for tokens_, uniform in zip(means["tokens"].cumsum(0), means["uniform"].cumsum(0), strict=True)
        ],
    }
    if prior is not None:
        measured |= {
            "cut_share": float((tokens.lengths > prior.max_length).double().mean()),
            "prior_bits": header + float(means["prior"].sum()),
            "prior_bits_saved": float(means["prior_saved"].sum()),
            "illegal_probability": float(means["illegal"].sum() / means["tokens"].sum()),
        }
        for entry, bits in zip(measured["prefixes"], means["prior"].cumsum(0), strict=True):
            entry["prior_bits"] = header + float(bits)
    return measured
