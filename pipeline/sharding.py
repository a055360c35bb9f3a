"""Fully sharded training (FSDP2): Lightning's strategy with checkpoints that are independent of the strategy.

A checkpoint is the same file, entry for entry, that DDP writes, so the strategy and the number of processes may change
from one call to the next. Lightning's own FSDP2 checkpoints number the state of the optimizer by the order of the
model's parameters instead of the optimizer's groups; another strategy would assign it to the wrong parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pipeline.ranks import Watched


class WatchedFSDP(Watched, ModelParallelStrategy):
    """Fully sharded data parallel on ``processes``, for a module that shards itself in ``configure_model``."""

    def __init__(self, processes: int, timeout: timedelta) -> None:
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: ``configure_model`` has already sharded the module."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls ``load_optimizer_state_dict``."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The full state on the CPU of the first process. Every process must call this."""
        saved: dict[str, Any] = optimizer.state_dict()
        full_state = {
            number: {name: self._to_full(value) for name, value in entries.items()}
            for number, entries in saved["state"].items()
        }
        return {**saved, "state": full_state}

    def _to_full(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full_tensor = value.full_tensor()
        return full_tensor.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint memory-mapped, so that the processes of a machine share it in the page cache."""
        loaded: dict[str, Any] = torch.load(checkpoint_path, "cpu", weights_only=weights_only, mmap=True)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's share of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's share of the optimizer state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {name: share_of(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": shares})


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a value with the shape of a parameter. Values of other shapes are returned unchanged."""
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
