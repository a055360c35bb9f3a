"""The scale of each element, in layouts of fixed length, in streams and in lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.layout import TokenLayout, Tokens
from stages.factory import build_grammar
from stages.grammar import Grammar


def scale_ids(tokens: Tokens, layout: TokenLayout, grammar: Grammar | None = None) -> Tensor:
    """int64 [B, L]: the scale of each element, undefined for padding. Streams without notes are annotated for this."""
    if layout.ends == "fixed":
        lengths = torch.tensor([scale.length for scale in layout.scales])
        scales = torch.arange(len(lengths)).repeat_interleave(lengths)[: tokens.ids.shape[1]]
        return scales.to(tokens.ids.device).expand(len(tokens), -1)
    grammar = grammar or build_grammar(layout)
    assert grammar is not None
    return grammar.scales(tokens)


def keep_scales(tokens: Tokens, layout: TokenLayout, scales: Sequence[int], grammar: Grammar | None = None) -> Tokens:
    """The elements of some scales, in unchanged order. Drops notes and remarks."""
    kept = (
        torch.isin(scale_ids(tokens, layout, grammar), torch.tensor(list(scales), device=tokens.ids.device))
        & tokens.counted
    )
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    lengths = kept.sum(1)
    ids = tokens.ids.gather(1, order.unsqueeze(-1).expand_as(tokens.ids))
    result = Tokens(ids[:, : int(lengths.max()) if len(tokens) else 0], lengths, tokens.header)
    result.ids = result.ids.masked_fill(~result.counted.unsqueeze(-1), 0)
    return result
