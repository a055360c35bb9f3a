"""Quantisers behind one interface: features → ids → features.

What is notable here:

- ``CosineVQ`` is ViT-VQGAN's factorised, l2-normalised codebook, started from data; codes that die are revived;
- ``FSQ`` (Mentzer et al. 2023) has no codebook to collapse: each of a few bounded numbers is rounded;
- both work in float32 whatever autocast says (bfloat16 cannot tell 257 codes apart), and are bit-equal on all ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from data.errors import InputError
from data.layout import Field


@dataclass
class QuantizerConfig:
    """What every quantiser's section has."""

    kind: str = "fsq"
    """fsq or cosine; picks the other keys of this section."""


@dataclass
class FSQConfig(QuantizerConfig):
    """Finite scalar quantisation."""

    kind: str = "fsq"
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    """Values of each rounded number; their product is the number of codes."""


@dataclass
class CosineVQConfig(QuantizerConfig):
    """Factorised vector quantisation by cosine similarity."""

    kind: str = "cosine"
    codes: int = 8192
    """Entries of each codebook."""
    code_dim: int = 32
    """Width of a code; encodings are projected to it."""
    revive_every: int = 20
    """Forward passes between two looks for dead codes; 0 never revives."""
    revive_below: float = 0.03
    """A code is dead when its averaged use falls below this share of an equal share."""


@dataclass
class Quantized:
    """Result of a quantiser."""

    features: Tensor
    """[B, N, decoder width], straight-through"""
    ids: Tensor
    """int64 [B, N, F]"""
    losses: dict[str, Tensor]
    """Scalars: commitment and codebook, or nothing."""


class Quantizer(nn.Module, ABC):
    """Features [B, N, width_in] → ids [B, N, F] and features [B, N, width_out]."""

    fields: tuple[Field, ...]
    project_out: nn.Linear

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Quantise; in training mode this may also start and revive the codebook."""

    @abstractmethod
    def margins(self, features: Tensor) -> Tensor:
        """How far each choice is from another one: float32 [B, N], 0 for a tie; the unit is the quantiser's own."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """The codes float32 [B, N, D] that ids [B, N, F] stand for. Raises ValueError for ids out of range."""

    def lookup(self, ids: Tensor) -> Tensor:
        """Features [B, N, width_out] of ids [B, N, F]. Raises ValueError for ids out of range."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.project_out(self.codes(ids))

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError when an id lies outside its vocabulary; an exported program raises RuntimeError."""
        for index, part in enumerate(self.fields):
            if torch.compiler.is_exporting():
                inside = (ids[..., index] >= 0) & (ids[..., index] < part.vocabulary_size)
                torch._assert_async(inside.all(), f"an id of field {part.name} is not 0 to {part.vocabulary_size - 1}")
                continue
            low, high = int(ids[..., index].min()), int(ids[..., index].max())
            if low < 0 or high >= part.vocabulary_size:
                seen = low if low < 0 else high
                raise InputError(f"id {seen} of field {part.name}; allowed: 0 to {part.vocabulary_size - 1}")

    def copy_revived(self, average: Quantizer) -> None:
        """Copy rows that were revived since the last call into ``average``, the averaged copy of this module."""


class FSQ(Quantizer):
    """Finite scalar quantisation, arXiv 2309.15505 section 3.1. Raises ValueError for fewer than two levels."""

    levels: Tensor
    strides: Tensor

    def __init__(self, config: FSQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        if not config.levels or min(config.levels) < 2:
            raise InputError(f"tokenizer.quantizer.levels={config.levels}; allowed: two or more values a number")
        self.fields = (Field("code", math.prod(config.levels)),)
        self.project_in = nn.Linear(width_in, len(config.levels))
        self.project_out = nn.Linear(len(config.levels), width_out)
        strides = [math.prod(config.levels[:index]) for index in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def _bounded(self, features: Tensor) -> Tensor:
        """What is rounded: [B, N, numbers]."""
        values = self.project_in(features.float())
        half = (self.levels - 1) * (1 + 1e-3) / 2
        # an even number of values has no middle: shift so that rounding gives exactly that many
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(values + torch.atanh(offset / half)) * half - offset

    def forward(self, features: Tensor) -> Quantized:
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bounded(features)
            rounded = bounded + (bounded.round() - bounded).detach()
            ids = ((rounded.detach().round().long() + self.levels // 2) * self.strides).sum(-1, keepdim=True)
            return Quantized(self.project_out(rounded / (self.levels // 2)), ids, {})

    def margins(self, features: Tensor) -> Tensor:
        """Distance to the nearest rounding border, of the number nearest to one; at most 0.5."""
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bounded(features)
            return (0.5 - (bounded - bounded.round()).abs()).amin(-1)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        digits = (ids // self.strides) % self.levels - self.levels // 2
        return digits.float() / (self.levels // 2)


class CosineVQ(Quantizer):
    """ViT-VQGAN's codebook (arXiv 2110.04627 section 3.2): codes and encodings of unit length, trained by gradient.

    Codes start as encodings of the first batch. A code whose averaged use is near zero becomes an encoding of the
    current batch. Use is summed over ranks and new rows come from rank 0, so codebooks stay bit-equal.
    """

    usage: Tensor
    started: Tensor
    revived: Tensor
    passes: Tensor

    def __init__(self, config: CosineVQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        if config.codes < 2:
            raise InputError(f"tokenizer.quantizer.codes={config.codes}; allowed: 2 or more")
        self.config = config
        self.fields = (Field("code", config.codes),)
        self.project_in = nn.Linear(width_in, config.code_dim)
        self.project_out = nn.Linear(config.code_dim, width_out)
        self.codebook = nn.Parameter(functional.normalize(torch.randn(config.codes, config.code_dim), dim=-1))
        self.register_buffer("usage", torch.full((config.codes,), 1.0 / config.codes))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("revived", torch.zeros(config.codes, dtype=torch.bool), persistent=False)

    def forward(self, features: Tensor) -> Quantized:
        with torch.autocast(features.device.type, enabled=False):
            encodings = functional.normalize(self.project_in(features.float()), dim=-1)
            if self.training and self.codebook.requires_grad:
                self._start_or_revive(encodings.detach().flatten(0, 1))
            codes = functional.normalize(self.codebook, dim=-1)
            ids = (encodings.detach() @ codes.detach().T).argmax(-1)
            if self.training and self.codebook.requires_grad:
                self._count(ids)
            chosen = functional.embedding(ids, codes)
            losses = {
                "commitment": functional.mse_loss(encodings, chosen.detach()),
                "codebook": functional.mse_loss(chosen, encodings.detach()),
            }
            straight = encodings + (chosen - encodings).detach()
            return Quantized(self.project_out(straight), ids.unsqueeze(-1), losses)

    def margins(self, features: Tensor) -> Tensor:
        """Similarity (cosine) of the best code above that of the second best."""
        with torch.autocast(features.device.type, enabled=False):
            encodings = functional.normalize(self.project_in(features.float()), dim=-1)
            best = (encodings @ functional.normalize(self.codebook, dim=-1).T).topk(2, dim=-1).values
            return best[..., 0] - best[..., 1]

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return functional.normalize(functional.embedding(ids[..., 0], self.codebook), dim=-1)

    @torch.no_grad()
    def _start_or_revive(self, encodings: Tensor) -> None:
        """Replace all rows at the first pass, dead rows later; the rows come from rank 0's encodings [M, D]."""
        if not self.started:
            dead = torch.ones_like(self.revived)
        elif self.config.revive_every and int(self.passes) % self.config.revive_every == 0:
            dead = self.usage < self.config.revive_below / self.config.codes
        else:
            dead = torch.zeros_like(self.revived)
        self.passes += 1
        count = int(dead.sum())
        if count == 0:
            return
        # a fresh row needs a little noise: two rows from one encoding would never part
        rows = encodings[torch.randint(len(encodings), (count,), device=encodings.device)]
        rows = functional.normalize(rows + 0.01 * torch.randn_like(rows), dim=-1)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(rows, src=0)
        self.codebook.data[dead] = rows
        self.usage[dead] = 1.0 / self.config.codes
        self.revived |= dead
        self.started.fill_(True)

    @torch.no_grad()
    def _count(self, ids: Tensor) -> None:
        counts = torch.bincount(ids.flatten(), minlength=self.config.codes).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        self.usage.lerp_(counts / counts.sum(), 0.01)

    @torch.no_grad()
    def copy_revived(self, average: Quantizer) -> None:
        assert isinstance(average, CosineVQ)
        average.codebook.data[self.revived] = self.codebook.data[self.revived]
        self.revived.zero_()
