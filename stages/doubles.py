"""Device for float64 computations: Apple GPUs do not support float64, so the CPU is used instead."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Device types without float64."""


def doubles_at(device: torch.device) -> torch.device:
    """The device itself, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def doubled(x: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device, or on the CPU if the device has no float64."""
    return x.to(doubles_at(x.device)).double()  # move first: the device may not be able to convert
