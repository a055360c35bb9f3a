"""Shared by the two LightningModules: learning rate schedule, weight averaging and the check for non-finite losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.errors import OctavesError


class NonFiniteLoss(OctavesError):
    """A loss term is NaN or infinite. The message has step, term and samples. No update was made with it."""


class RateConfig(Protocol):
    """Keys of a training section that a schedule needs."""

    max_steps: int
    warmup_steps: int
    final_learning_rate_share: float


def build_schedule(optimizer: torch.optim.Optimizer, config: RateConfig) -> CosineLRScheduler:
    """Linear warm-up, then cosine decay. ``schedule.step_update(step)`` sets the rates; the schedule has no state.

    The rate of groups with ``lr_scale`` is multiplied by it.
    """
    rate = optimizer.param_groups[0]["lr"]
    return CosineLRScheduler(
        optimizer,
        t_initial=config.max_steps,
        lr_min=rate * config.final_learning_rate_share,
        warmup_t=min(config.warmup_steps, config.max_steps - 1),
        warmup_lr_init=rate * 0.01,
        t_in_epochs=False,
    )


def build_average(module: nn.Module, decay: float) -> ModelEmaV3:
    """Exponential moving average of a network, used for validation, export, caching and evaluation."""
    average = ModelEmaV3(module, decay=decay, use_warmup=True)
    average.requires_grad_(False)  # otherwise DDP waits for its gradients
    return average


def seed_batch(seed: int, rank: int, batches_seen: int) -> None:
    """Seed torch for one micro-batch, so that a resumed run draws the same numbers as an uninterrupted one."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, batches_seen]).generate_state(1)[0]))


class NamesSamples(Protocol):
    """Function from indices to names of samples, called only for error messages."""

    def __call__(self, indices: list[int]) -> list[str]: ...


def check_finite(
    terms: Mapping[str, Tensor],
    step: int,
    indices: Tensor,
    names: NamesSamples,
    any_process: Callable[[bool], bool],
) -> None:
    """Raise NonFiniteLoss for the first term that is NaN or infinite. ``indices`` [B] are the samples of the batch.

    ``any_process`` is a logical or over all processes. If only one process stopped, the others would wait for its
    gradients.
    """
    finite = bool(torch.isfinite(torch.stack(list(terms.values()))).all())
    if not any_process(not finite):
        return
    if finite:
        raise NonFiniteLoss(f"step {step}: the loss of another process is not finite; its message names the samples")
    name, value = next((name, value) for name, value in terms.items() if not torch.isfinite(value))
    raise NonFiniteLoss(
        f"step {step}: {name} is {value.item()}; samples: {', '.join(names(indices.tolist()))}. "
        "The last checkpoint is from before this step. Lower the learning rate, or train with precision=32"
    )


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of all gradients of a network. With sharded parameters, all processes must call this."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def trainer_steps(steps: int, num_optimizers: int) -> int:
    """Lightning's ``global_step`` after ``steps`` updates. It counts the steps of every optimizer."""
    return steps * num_optimizers
