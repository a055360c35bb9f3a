"""Attention for both stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

FUSED_FROM = 384
"""Length from which a CPU takes the fused kernel."""


_fused_only = False

Spans = Sequence[tuple[slice, Sequence[slice]]]
"""What blocks of queries look at: (queries, keys), the queries without a gap from the first to the last."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, ``attend`` takes the fused kernel everywhere, as on a GPU; what is kept is then what a GPU keeps."""
    global _fused_only
    before, _fused_only = _fused_only, True
    try:
        yield
    finally:
        _fused_only = before


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Spans | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [B, H, L, D] with keys [B, H, M, D]; ``mask`` is True where to look: [L, M], or
    anything that broadcasts to [B, H, L, M]. Spans in its place cost only the pairs that they name.

    ``causal`` stands for a lower triangular mask, which lets a GPU take its fastest kernel.

    On a CPU short sequences take the plain softmax form: the fused kernel's backward pass in bfloat16 took half of a
    small model's training step there. Longer ones without a mask take the fused kernel, at twice the speed from 480
    elements on and without the matrix of all pairs. On other devices PyTorch chooses the kernel.
    """
    if mask is not None and not isinstance(mask, Tensor):
        parts = []
        for queries, seen in mask:
            keys, values = (_at(each, seen) for each in (key, value))
            parts.append(attend(query[:, :, queries], keys, values))
        return torch.cat(parts, dim=2)
    if _fused_only or query.device.type != "cpu" or (mask is None and query.shape[-2] >= FUSED_FROM):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


def _at(x: Tensor, parts: Sequence[slice]) -> Tensor:
    """The places ``parts`` of keys or values [B, H, M, D], one after the other; a view where it is one part."""
    pieces = [x[:, :, part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
