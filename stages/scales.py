"""To which scale each element belongs, in layouts of fixed length and in streams."""

from __future__ import annotations

import torch
from torch import Tensor

from data.layout import TokenLayout, Tokens
from stages.factory import build_grammar
from stages.grammar import Grammar


def scale_ids(tokens: Tokens, layout: TokenLayout, grammar: Grammar | None = None) -> Tensor:
    """int64 [B, L]: the scale of each element that counts; in streams, found again where there are no notes."""
    if layout.ends == "fixed":
        lengths = torch.tensor([scale.length for scale in layout.scales])
        scales = torch.arange(len(lengths)).repeat_interleave(lengths)[: tokens.ids.shape[1]]
        return scales.to(tokens.ids.device).expand(len(tokens), -1)
    grammar = grammar or build_grammar(layout)
    assert grammar is not None
    return grammar.scales(tokens)
