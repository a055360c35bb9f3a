"""Score elements under logits and a grammar's allowed ids."""

from __future__ import annotations

from torch import Tensor

from stages.contract import FORBIDDEN


def judge(logits: Tensor, ids: Tensor, allowed: Tensor, loosely: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
    """(nll, legal_nll, saved) of one field, each float32 [B, L], as defined in ``PriorOutput``.

    ``logits`` are [B, L, V] and ``ids`` [B, L]. ``allowed`` bool [B, L, V] marks the ids that the grammar allows, a
    subset of ``loosely`` bool [B, L, V]. The results are 0 where ``counted`` is False.
    """
    everything = logits.logsumexp(-1)
    legal = logits.masked_fill(~allowed, FORBIDDEN).logsumexp(-1)
    nll = legal - logits.gather(-1, ids.unsqueeze(-1))[..., 0]
    saved = logits.masked_fill(~loosely, FORBIDDEN).logsumexp(-1) - legal
    nll, legal_nll, saved = (part.masked_fill(~counted, 0) for part in (nll, everything - legal, saved))
    return nll, legal_nll, saved.detach()
