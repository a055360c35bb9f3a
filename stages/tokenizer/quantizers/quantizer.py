"""The interface of all quantisers."""

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
    """Products of float32 are computed in float32 here, whatever autocast says and whether or not GPUs may use TF32.

    TF32 is a setting of the process, so a compiled or exported program keeps what it is run under, and a backward pass
    outside of this context too.
    """
    allowed = "highest"
    if device.type == "cuda" and not torch.compiler.is_compiling():
        allowed = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if allowed == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)


@dataclass
class Quantized:
    """Result of a quantiser."""

    features: Tensor
    """[B, N, decoder width]; the gradient passes to the encoder as the quantiser says"""
    ids: Tensor
    """int64 [B, N, F]"""
    losses: dict[str, Tensor]
    """Scalars: commitment, codebook and entropy, as far as the quantiser has them."""


class Quantizer(nn.Module, ABC):
    """Features [B, N, width_in] → ids [B, N, F] and features [B, N, width_out].

    ``encodings`` are float32 [B, N, D] in every quantiser: what is left of the features for the codes to stand for.
    """

    fields: tuple[Field, ...]
    project_in: nn.Linear
    project_out: nn.Linear

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Quantise; in training mode this may also start and revive codes, on all ranks together."""

    @abstractmethod
    def encodings(self, features: Tensor) -> Tensor:
        """What is quantised, of float32 features."""

    @abstractmethod
    def choose(self, encodings: Tensor) -> Tensor:
        """Ids int64 [B, N, F] of encodings."""

    @abstractmethod
    def distances(self, encodings: Tensor) -> Tensor:
        """See ``margins``."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """The codes float32 [B, N, D] that ids [B, N, F] stand for. Raises ValueError for ids out of range."""

    def ids(self, features: Tensor) -> Tensor:
        """The ids int64 [B, N, F] of features, and nothing else of ``forward``."""
        with full_precision(features.device):
            return self.choose(self.encodings(features.float()))

    def margins(self, features: Tensor) -> Tensor:
        """How far each choice is from another one: float32 [B, N], 0 for a tie; the unit is the quantiser's own."""
        with full_precision(features.device):
            return self.distances(self.encodings(features.float()))

    def lookup(self, ids: Tensor) -> Tensor:
        """Features [B, N, width_out] of ids [B, N, F]. Raises ValueError for ids out of range."""
        with full_precision(ids.device):
            return self.project_out(self.codes(ids))

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError when an id lies outside its vocabulary; an exported program raises RuntimeError."""
        for index, part in enumerate(self.fields):
            if torch.compiler.is_exporting():
                inside = (ids[..., index] >= 0) & (ids[..., index] < part.vocabulary_size)
                torch._assert_async(inside.all(), f"an id of field {part.name} is not 0 to {part.vocabulary_size - 1}")
                continue
            if not ids.numel():
                return
            low, high = int(ids[..., index].min()), int(ids[..., index].max())
            if low < 0 or high >= part.vocabulary_size:
                seen = low if low < 0 else high
                raise InputError(f"id {seen} of field {part.name}; allowed: 0 to {part.vocabulary_size - 1}")

    def copy_revived(self, average: Quantizer) -> None:
        """Copy rows that were revived since the last call into ``average``, the averaged copy of this module."""


def named_fields(sizes: list[int]) -> tuple[Field, ...]:
    """``code`` of the vocabulary ``sizes[0]``, or code1, code2, … of several."""
    if len(sizes) == 1:
        return (Field("code", sizes[0]),)
    return tuple(Field(f"code{number}", size) for number, size in enumerate(sizes, 1))
