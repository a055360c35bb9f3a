"""Collective operations of quantizers, so that several ranks use the same codes as one process with the joint batch."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist


def several_ranks() -> bool:
    """True if several processes train the same weights."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of ``values`` over all ranks, without gradient."""
    total = values.detach().clone()
    if several_ranks():
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of ``values`` over all ranks. On each rank the full gradient flows to its own ``values``.

    DDP then averages gradients over ranks, which gives the correct gradient of a function of the mean without
    communication in the backward pass.
    """
    if not several_ranks():
        return values
    mean = sum_over_ranks(values) / dist.get_world_size()
    return values + (mean - values).detach()


def of_first_rank(values: Tensor) -> Tensor:
    """Broadcast the ``values`` of rank 0 to all ranks."""
    if several_ranks():
        dist.broadcast(values, src=0)
    return values
