"""Precision of networks in all commands: ``auto``, ``32`` or ``bf16``.

Notes:

- ``auto`` is bfloat16 if the hardware supports it natively, otherwise float32. Emulated bfloat16 is 3 to 350 times
  slower than float32. Hardware capabilities can only rule out native bfloat16, so a timed matrix product decides.
- ``bf16`` means autocast: weights stay in float32, matrix products are computed in bfloat16. Transforms, quantizers,
  perceptual distances and adversarial losses always stay in float32.
- Outside of training, a model stores its precision as an attribute, so that every command runs it in the same one.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.errors import InputError

NAMES = {"32": "float32", "bf16": "bfloat16 autocast"}
NATIVE_ON_CPU = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")
"""CPU capabilities in PyTorch's naming; native bfloat16 needs at least one of them."""
SIDES = {"cpu": 256, "cuda": 4096}
"""Side of the square matrices in the timed product, by device type."""
SECONDS = 0.03
"""Time limit for repeating the product in one dtype. An emulated product exceeds it at the first repetition."""
CLEARLY_FASTER = 1.2
"""Minimum speedup for bfloat16, since casts of weights and activations take time too."""


def resolve(asked: str, device: torch.device) -> str:
    """Resolve one of ``PRECISIONS`` to ``32`` or ``bf16``. Raises InputError if the device does not support bf16."""
    if asked == "auto":
        return _fastest(device.type)
    if asked == "bf16" and _has_no_bf16(device.type):
        raise InputError(f"precision=bf16: this {device.type} device has no bfloat16; allowed: auto, 32")
    return asked


def slowness(precision: str, device: torch.device) -> str | None:
    """Warning about the slowdown if the device emulates this precision; None otherwise."""
    if precision != "bf16" or _fastest(device.type) == "bf16":
        return None
    times = _product_seconds(device.type, torch.bfloat16) / _product_seconds(device.type, torch.float32)
    return f"bf16 is emulated on this {device.type}: a matrix product takes {times:.0f} times as long as in float32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast context for ``32`` or ``bf16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@cache
def _fastest(kind: str) -> str:
    if kind not in SIDES or _has_no_bf16(kind) or _is_emulated(kind):
        return "32"
    half, single = (_product_seconds(kind, dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bf16" if single > CLEARLY_FASTER * half else "32"


def _has_no_bf16(kind: str) -> bool:
    """True if a device type does not support bfloat16 at all. Apple GPUs count as such: they were not tested."""
    return kind == "mps" or (kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False))


def _is_emulated(kind: str) -> bool:
    """True if the CPU reports no native bfloat16 products. False if its capabilities are unknown."""
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.11
        return False
    known_machine = platform.machine().lower() in ("x86_64", "amd64", "arm64", "aarch64")
    capabilities = torch.cpu.get_capabilities()
    return known_machine and not any(capabilities.get(name, False) for name in NATIVE_ON_CPU)


@cache
def _product_seconds(kind: str, dtype: torch.dtype) -> float:
    """Minimum time in seconds of a product of two square matrices."""
    matrix = torch.ones(SIDES[kind], SIDES[kind], dtype=dtype, device=kind)
    first_start = time.perf_counter()
    seconds = float("inf")
    while (start := time.perf_counter()) - first_start < SECONDS:
        product = matrix @ matrix
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
        del product
    return seconds


class OwnPrecision:
    """Mixin for models: if ``precision`` is set, the methods ``IN_PRECISION`` compute in it."""

    IN_PRECISION: ClassVar[tuple[str, ...]] = ()
    precision: str | None = None
    """32 or bf16; None, as in training, uses the autocast context of the caller."""

    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        for name in cls.IN_PRECISION:
            method = cls.__dict__.get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, _in_own_precision(method))


def _in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Any, *arguments: Any, **keys: Any) -> Any:
        weights = None if self.precision is None else next(self.parameters(), None)
        if weights is None:  # no precision set, or a codec, which computes in float64
            return method(self, *arguments, **keys)
        with autocast(self.precision, weights.device):
            return method(self, *arguments, **keys)

    return run


@contextmanager
def running_in(model: Any, precision: str) -> Iterator[None]:
    """Context in which a frozen model of ``OwnPrecision`` computes in ``precision``, without repeated casts.

    Autocast casts weights without gradients again in every call, thousands of times during sampling. Here the weights
    of linear layers are cast once, which gives the same bits.
    """
    before, originals = model.precision, []
    model.precision = precision
    try:
        for parameter in _weights_to_cast(model) if precision == "bf16" else ():
            originals.append((parameter, parameter.data))
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, original in originals:
            parameter.data = original
        model.precision = before


def _weights_to_cast(model: nn.Module) -> list[Tensor]:
    """Frozen float32 parameters that only linear layers use, without duplicates."""
    linear: dict[int, Tensor] = {}
    elsewhere: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear):
                linear[id(parameter)] = parameter
            else:
                elsewhere.add(id(parameter))
    return [
        parameter
        for key, parameter in linear.items()
        if key not in elsewhere and parameter.dtype == torch.float32 and not parameter.requires_grad
    ]
