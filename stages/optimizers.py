"""Optimizers of both stages: AdamW, or Muon for the matrices of hidden layers and AdamW for all other parameters.

Muon is *MomentUm Orthogonalized by Newton-schulz* (Jordan et al., https://kellerjordan.github.io/posts/muon/). Notes:

- An update is the Nesterov momentum of a matrix with all singular values brought near 1, times 0.2 sqrt(larger side).
  This matches the size of AdamW's updates at the same rate (Liu et al., arXiv 2502.16982, section 2.2).
- The network marks hidden matrices by their classes (``stages/layers.py``), not by a list of names. Queries, keys and
  values in one weight are three matrices. Orthogonalized as one, they would share one scale, dominated by the largest.
- Both kinds of parameters are groups of one optimizer, so they share one step count, one checkpoint and one schedule.
- Muon of PyTorch and of timm always computes in bfloat16, which many CPUs only emulate, at a multiple of the time. Here
  the dtype is an argument. The iteration itself is timm's.
- With sharded parameters (FSDP), each process gathers the whole momentum, computes the full update and keeps its shard.
  With replicated parameters, all processes compute the same update from the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from stages.layers import FusedLinear, HiddenLayers

MOMENTUM = 0.95
STEPS = 5
"""Newton-Schulz iterations per update."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial. They maximize the slope at zero, so singular values end between about 0.7 and
1.2 instead of exactly at 1."""
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates divided by the rate, as observed by Liu et al. (see above)."""
NUMBERS_AT_ONCE = 2**24
"""Maximum number of values in a batch of equal-sized matrices. On a GPU many small matrices take as long as a few."""


class OptimizerConfig(Protocol):
    """Keys of a training section that an optimizer needs."""

    optimizer: str
    precision: str
    learning_rate: float
    matrix_learning_rate: float
    betas: list[float]
    weight_decay: float


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a network from its training section. Muon multiplies matrices in ``config.precision``.

    All groups start with ``learning_rate``; ``stages.training.build_schedule`` then sets their rates.
    """
    betas = (config.betas[0], config.betas[1])
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.optimizer == "adamw":
        return build_adamw(network, config.learning_rate, betas, config.weight_decay)
    matrices = matrices_of(network)
    groups = [
        group | {"params": others}
        for group in param_groups_weight_decay(network, config.weight_decay)
        if (others := [parameter for parameter in group["params"] if parameter not in matrices])
    ]
    for parts in sorted({*matrices.values()}):
        groups.append(
            {
                "params": [parameter for parameter, number in matrices.items() if number == parts],
                "weight_decay": config.weight_decay,
                "matrices": parts,
                "lr_scale": config.matrix_learning_rate / config.learning_rate,  # a factor in timm's schedules
            }
        )
    return Muon(groups, config.learning_rate, betas, dtype)


def build_adamw(
    network: nn.Module, learning_rate: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases, norms and other vectors."""
    return create_optimizer_v2(network, opt="adamw", lr=learning_rate, weight_decay=decay, betas=betas)


def matrices_of(network: nn.Module) -> dict[Tensor, int]:
    """Trainable weights of linear layers in hidden parts of a network, each with its number of stacked matrices."""
    return {
        layer.weight: layer.parts if isinstance(layer, FusedLinear) else 1
        for part in network.modules()
        if isinstance(part, HiddenLayers)
        for layer in part.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    }


def learning_rates(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """Learning rates for logs: ``name``, and ``matrix_{name}`` if the matrices have their own rate."""
    rates = {name: optimizer.param_groups[0]["lr"]}
    rates |= {f"matrix_{name}": group["lr"] for group in optimizer.param_groups if group.get("matrices")}
    return {name: torch.tensor(rate) for name, rate in rates.items()}


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``matrices`` above 0, which is the number of matrices per weight; AdamW for other groups.

    Matrix products are computed in ``dtype``. Every group must have a ``weight_decay``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        learning_rate: float,
        betas: tuple[float, float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": 1e-8, "matrices": 0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters. Calls ``closure`` first and returns its result."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrices"]:
                for same_shape in _group_by_shape(parameters):
                    self._move_matrices(same_shape, group)
            else:
                self._move_others(parameters, group)
        return loss

    def _move_matrices(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Muon update of weights with the same shape."""
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            direction = parameter.grad.lerp(momentum, MOMENTUM)
            directions.append(direction.full_tensor() if isinstance(direction, DTensor) else direction)
        matrices = torch.stack(directions).unflatten(1, (group["matrices"], -1)).flatten(0, 1)
        rate = group["lr"] * RMS_OF_ADAMW * max(matrices.shape[1:]) ** 0.5
        updates = orthogonalised(matrices, self.dtype).unflatten(0, (len(parameters), -1)).flatten(1, 2)
        for parameter, update in zip(parameters, updates.to(matrices.dtype), strict=True):
            if isinstance(parameter, DTensor):
                update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _move_others(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """AdamW update by PyTorch's functional ``adamw``."""
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros(()), **moments}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Set the singular values of ``matrices`` [N, m, n] to about 1, with the same singular vectors, in ``dtype``."""
    return zeropower_via_newtonschulz(matrices, STEPS, [COEFFICIENTS], dtype=dtype)


def _group_by_shape(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters by shape into lists of at most ``NUMBERS_AT_ONCE`` values, with at least one parameter each."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, same_shape in by_shape.items():
        group_size = max(1, NUMBERS_AT_ONCE // shape.numel())
        for start in range(0, len(same_shape), group_size):
            yield same_shape[start : start + group_size]
