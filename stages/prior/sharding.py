"""A prior whose weights lie in parts on all processes: fully sharded data parallel (FSDP, arXiv 2304.11277).

What is notable here:

- each layer is gathered for its own forward and backward pass and given back; what stands outside the layers
  (embeddings, heads, norms) is one more part, gathered for the whole pass;
- gradients, the moments of Adam and the averaged copy are parts like the weights, so a process keeps 1 / world size of
  all five;
- weights are built whole, from one seed on every process, and cut then: they are those of one process.
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
    """Leave this process its part of every weight; ``mesh`` [world size] are the processes that have the others."""
    for block in network.modules():
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "remember")
    # else the last part stays gathered when a pass forward has no pass backward: in a validation
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def sharded_parts(network: nn.Module) -> tuple[list[int], int]:
    """How many parameters are gathered together: those of each layer, and all others."""
    layers = [
        sum(each.numel() for each in block.parameters()) for block in network.modules() if isinstance(block, Block)
    ]
    return layers, sum(each.numel() for each in network.parameters()) - sum(layers)


def whole_state(network: nn.Module) -> Mapping[str, Tensor]:
    """The whole state on the CPU of the first process, sharded or not; empty on the others, which must ask, too."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(Mapping[str, Tensor], get_model_state_dict(network, options=options))
