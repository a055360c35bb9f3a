"""What the processes of a training agree on, so that their codes are those of one process with the joint batch."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist


def several_ranks() -> bool:
    """Whether other processes train the same weights."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' ``values``, without a gradient."""
    total = values.detach().clone()
    if several_ranks():
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of all ranks' ``values``, each of which passes the whole gradient to its own.

    DDP averages gradients over ranks, which then is the gradient of a function of the mean: no second communication
    in the backward pass.
    """
    if not several_ranks():
        return values
    mean = sum_over_ranks(values) / dist.get_world_size()
    return values + (mean - values).detach()


def of_first_rank(values: Tensor) -> Tensor:
    """Rank 0's ``values``, on all ranks."""
    if several_ranks():
        dist.broadcast(values, src=0)
    return values
