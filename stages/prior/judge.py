"""What logits say of given elements, where a grammar says which ids may come."""

from __future__ import annotations

from torch import Tensor

from stages.contract import FORBIDDEN


def judge(logits: Tensor, ids: Tensor, allowed: Tensor, loosely: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
    """(nll, legal_nll, saved) of one field, float32 [B, L], as ``PriorOutput`` has them; 0 where not ``counted``.

    logits [B, L, V] of ids [B, L], of which ``allowed`` bool [B, L, V] may come, a part of ``loosely``.
    """
    everything = logits.logsumexp(-1)
    legal = logits.masked_fill(~allowed, FORBIDDEN).logsumexp(-1)
    nll = legal - logits.gather(-1, ids.unsqueeze(-1))[..., 0]
    saved = logits.masked_fill(~loosely, FORBIDDEN).logsumexp(-1) - legal
    nll, legal_nll, saved = (part.masked_fill(~counted, 0) for part in (nll, everything - legal, saved))
    return nll, legal_nll, saved.detach()
