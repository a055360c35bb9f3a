"""The interface of all quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import Field


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context that computes products of float32 in float32, without autocast and without TF32.

    TF32 is a setting of the process. So compiled or exported programs, and backward passes outside of this context, use
    the setting that is active when they run.
    """
    precision = "highest"
    if device.type == "cuda" and not torch.compiler.is_compiling():
        precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@dataclass
class Quantized:
    """Result of a quantizer."""

    features: Tensor
    """[B, N, decoder width]; gradients reach the encoder through the gradient estimator of the quantizer"""
    ids: Tensor
    """int64 [B, N, F]"""
    losses: dict[str, Tensor]
    """Scalars: commitment, codebook and entropy, if the quantizer has them."""


class Quantizer(nn.Module, ABC):
    """Features [B, N, width_in] → ids [B, N, F] and features [B, N, width_out].

    ``encodings`` are the projected features that are quantized: float32 [B, N, D].
    """

    fields: tuple[Field, ...]
    project_in: nn.Linear
    project_out: nn.Linear

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Quantize features. In training mode this may also initialize and revive codes, on all ranks together."""

    @abstractmethod
    def encodings(self, features: Tensor) -> Tensor:
        """Encodings float32 [B, N, D] of float32 features."""

    @abstractmethod
    def choose(self, encodings: Tensor) -> Tensor:
        """Ids int64 [B, N, F] for encodings."""

    @abstractmethod
    def distances(self, encodings: Tensor) -> Tensor:
        """See ``margins``."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """Codes float32 [B, N, D] of ids [B, N, F]. Raises ValueError for ids out of range."""

    def ids(self, features: Tensor) -> Tensor:
        """Only the ids int64 [B, N, F] of features, without the other results of ``forward``."""
        with full_precision(features.device):
            return self.choose(self.encodings(features.float()))

    def margins(self, features: Tensor) -> Tensor:
        """Distance of each choice from a different choice: float32 [B, N], 0 for a tie. The unit depends on the
        quantizer."""
        with full_precision(features.device):
            return self.distances(self.encodings(features.float()))

    def lookup(self, ids: Tensor) -> Tensor:
        """Features [B, N, width_out] of ids [B, N, F]. Raises ValueError for ids out of range."""
        with full_precision(ids.device):
            return self.project_out(self.codes(ids))

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError for an id outside its vocabulary; exported programs raise RuntimeError."""
        for index, part in enumerate(self.fields):
            if torch.compiler.is_exporting():
                in_range = (ids[..., index] >= 0) & (ids[..., index] < part.vocabulary_size)
                torch._assert_async(
                    in_range.all(), f"an id of field {part.name} is not 0 to {part.vocabulary_size - 1}"
                )
                continue
            if not ids.numel():
                return
            low, high = int(ids[..., index].min()), int(ids[..., index].max())
            if low < 0 or high >= part.vocabulary_size:
                invalid = low if low < 0 else high
                raise InputError(f"id {invalid} of field {part.name}; allowed: 0 to {part.vocabulary_size - 1}")

    def copy_revived(self, average: Quantizer) -> None:
        """Copy rows that were revived since the last call into ``average``, the moving average of this module."""


def named_fields(sizes: list[int]) -> tuple[Field, ...]:
    """One field ``code`` for a single vocabulary size, or code1, code2, … for several."""
    if len(sizes) == 1:
        return (Field("code", sizes[0]),)
    return tuple(Field(f"code{number}", size) for number, size in enumerate(sizes, 1))
