"""Where float64 is computed: Apple's GPU has no such numbers, so there the CPU does it."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices."""


def doubles_at(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one without float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def doubled(x: Tensor) -> Tensor:
    """A tensor in float64, on its device or on the CPU for one without float64."""
    return x.to(doubles_at(x.device)).double()  # in this order: the device must not have to convert
