"""Attention for both stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

FUSED_FROM = 384
"""Sequence length from which CPUs use the fused kernel."""


_fused_only = False

Spans = Sequence[tuple[slice, Sequence[slice]]]
"""Block-sparse mask: pairs (queries, keys). The slices of queries are contiguous and cover the sequence."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Context in which ``attend`` always uses the fused kernel, so that autograd saves the same tensors as on a GPU."""
    global _fused_only
    before, _fused_only = _fused_only, True
    try:
        yield
    finally:
        _fused_only = before


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Spans | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of queries [B, H, L, D] with keys and values [B, H, M, D].

    ``mask`` is True for the pairs to attend to: bool [L, M], or broadcastable to [B, H, L, M]. With ``Spans`` as the
    mask, only the listed pairs are computed.

    ``causal`` means a lower triangular mask, and allows the fastest kernel on a GPU.

    On a CPU, short sequences use a plain softmax, because the backward pass of the fused kernel in bfloat16 took half
    of the training step of a small model. Longer sequences without a mask use the fused kernel: from 480 elements it is
    twice as fast, and it does not store the matrix of all pairs. On other devices PyTorch chooses the kernel.
    """
    if mask is not None and not isinstance(mask, Tensor):
        outputs = []
        for query_slice, key_slices in mask:
            keys, values = (_at(states, key_slices) for states in (key, value))
            outputs.append(attend(query[:, :, query_slice], keys, values))
        return torch.cat(outputs, dim=2)
    if _fused_only or query.device.type != "cpu" or (mask is None and query.shape[-2] >= FUSED_FROM):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


def _at(x: Tensor, parts: Sequence[slice]) -> Tensor:
    """Concatenate slices of keys or values [B, H, M, D] along M; a view for a single slice."""
    pieces = [x[:, :, part] for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
