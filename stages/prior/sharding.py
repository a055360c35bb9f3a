"""Fully sharded data parallel training of a prior (FSDP, arXiv 2304.11277).

Design notes:

- each layer is gathered for its own forward and backward pass and then freed; the parameters outside the layers
  (embeddings, heads, norms) form one more group, gathered for the whole pass;
- gradients, both Adam moments and the averaged copy are sharded like the weights, so each process stores
  1 / world size of all five;
- every process builds the full weights from the same seed and then shards them, so they equal those of a
  single-process run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from stages.prior.blocks import Block


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every weight over the processes of ``mesh`` [world size]."""
    for block in network.modules():
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "remember")
    # without this the last group stays gathered after a forward pass without a backward pass, as in validation
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def sharded_parts(network: nn.Module) -> tuple[list[int], int]:
    """Parameter counts of the groups that are gathered together: (each layer, all other parameters)."""
    layers = [
        sum(parameter.numel() for parameter in block.parameters())
        for block in network.modules()
        if isinstance(block, Block)
    ]
    return layers, sum(parameter.numel() for parameter in network.parameters()) - sum(layers)


def whole_state(network: nn.Module) -> Mapping[str, Tensor]:
    """Full state dict on the CPU of rank 0, sharded or not; empty on other ranks. All ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(Mapping[str, Tensor], get_model_state_dict(network, options=options))
