"""The optimisers of both stages: AdamW, and Muon for the matrices of hidden layers with AdamW for all else.

Muon is *MomentUm Orthogonalized by Newton-schulz* (Jordan et al., https://kellerjordan.github.io/posts/muon/). What is
notable here:

- an update moves a matrix by its momentum (Nesterov's), with all singular values brought near 1, times
  0.2 sqrt(larger side): as much as AdamW moves it at the same rate (Liu et al., arXiv 2502.16982, section 2.2);
- what is a hidden matrix says the network (``stages/layers.py``), not a list of names. Queries, keys and values that
  stand in one weight are three matrices: together they would share one scale, and the largest would have most of it;
- both kinds of parameters are groups of one optimiser, so one step counts, one checkpoint holds and one schedule sets
  both;
- PyTorch's and timm's Muon compute in bfloat16 always, which many CPUs only emulate, at a multiple of the time; here
  the type is an argument. The iteration itself is timm's;
- where processes keep shares of a matrix (FSDP), each gathers the whole momentum, does what all others do, and takes
  its share of the result. Processes that keep all of it do the same work on the same bits.
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
"""Newton-Schulz iterations of an update."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; chosen for speed from zero, so that singular values end between about 0.7 and 1.2, not at 1."""
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates, over the rate, as the paper above observed it."""
NUMBERS_AT_ONCE = 2**24
"""Numbers of equal matrices that are orthogonalised together: many small ones cost a GPU as much as a few."""


class OptimizerConfig(Protocol):
    """The keys of a training section that an optimiser needs."""

    optimizer: str
    precision: str
    learning_rate: float
    matrix_learning_rate: float
    betas: list[float]
    weight_decay: float


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a network as its training section wants it; Muon's matrix products have its precision.

    The rates are those of ``learning_rate`` in all groups until ``stages.training.build_schedule`` sets them.
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
                "lr_scale": config.matrix_learning_rate / config.learning_rate,  # timm's schedules multiply by it
            }
        )
    return Muon(groups, config.learning_rate, betas, dtype)


def build_adamw(
    network: nn.Module, learning_rate: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    """AdamW; biases, norms and other vectors are not decayed."""
    return create_optimizer_v2(network, opt="adamw", lr=learning_rate, weight_decay=decay, betas=betas)


def matrices_of(network: nn.Module) -> dict[Tensor, int]:
    """The weights of the linear layers in hidden parts of a network, as far as they are trained, each with the number
    of matrices that it is."""
    return {
        layer.weight: layer.parts if isinstance(layer, FusedLinear) else 1
        for part in network.modules()
        if isinstance(part, HiddenLayers)
        for layer in part.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    }


def learning_rates(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """Its rate under ``name`` for logs, and where matrices have one of their own, that too."""
    rates = {name: optimizer.param_groups[0]["lr"]}
    rates |= {f"matrix_{name}": group["lr"] for group in optimizer.param_groups if group.get("matrices")}
    return {name: torch.tensor(rate) for name, rate in rates.items()}


class Muon(torch.optim.Optimizer):
    """Muon in groups with ``matrices`` above 0, the number of matrices in each of their weights; AdamW in all others.

    Products of matrices are computed in ``dtype``; all groups must have a ``weight_decay``.
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
        """One update; returns what ``closure`` does, which is called first."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrices"]:
                for alike in _alike(parameters):
                    self._move_matrices(alike, group)
            else:
                self._move_others(parameters, group)
        return loss

    def _move_matrices(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Muon's update of weights of one shape."""
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
        moves = orthogonalised(matrices, self.dtype).unflatten(0, (len(parameters), -1)).flatten(1, 2)
        for parameter, move in zip(parameters, moves.to(matrices.dtype), strict=True):
            if isinstance(parameter, DTensor):
                move = distribute_tensor(move, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-rate)

    def _move_others(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """AdamW's update, by PyTorch's own."""
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
    """``matrices`` [N, m, n] with the same singular vectors and singular values near 1, in ``dtype``."""
    return zeropower_via_newtonschulz(matrices, STEPS, [COEFFICIENTS], dtype=dtype)


def _alike(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of one shape, none with more than ``NUMBERS_AT_ONCE`` numbers but a single one."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    for shape, same in shapes.items():
        many = max(1, NUMBERS_AT_ONCE // shape.numel())
        for start in range(0, len(same), many):
            yield same[start : start + many]
