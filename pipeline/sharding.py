"""Training on processes that keep a share of the training state each: Lightning's strategy for FSDP2, made ours.

What is notable here: a checkpoint is the file that DDP writes, entry for entry. Lightning's own numbers the optimiser's
state by the order of the model's parameters, not by that of the optimiser's groups; read under another strategy it
would be another parameter's. So the strategy and the number of processes may change from one call to the next.
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
    """Fully sharded data parallel on ``processes``, of a module that shards itself in ``configure_model``."""

    def __init__(self, processes: int, timeout: timedelta) -> None:
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """``configure_model`` has sharded the module before."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for ``load_optimizer_state_dict``."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the CPU of the first process; every process must ask."""
        saved: dict[str, Any] = optimizer.state_dict()
        whole = {
            number: {name: self._whole(value) for name, value in entries.items()}
            for number, entries in saved["state"].items()
        }
        return {**saved, "state": whole}

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint that stays in the page cache, which the processes of a machine share."""
        loaded: dict[str, Any] = torch.load(checkpoint_path, "cpu", weights_only=weights_only, mmap=True)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {
                number: {name: share_of(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": shares})


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """What this process keeps of a value of a parameter's shape; numbers of other shapes stay as they are."""
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
