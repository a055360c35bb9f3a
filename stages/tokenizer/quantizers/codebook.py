"""Shared by quantizers with a codebook: nearest-code search, losses, and a codebook that revives dead codes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from stages.tokenizer.parts import CodebookConfig, LearnedCodebookConfig
from stages.tokenizer.quantizers.gradients import GRADIENTS
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision, named_fields
from stages.tokenizer.quantizers.ranks import of_first_rank, sum_over_ranks


def check_codebook(config: CodebookConfig) -> None:
    """Raise ValueError for fewer than two codes or an unknown gradient."""
    if config.codes < 2:
        raise InputError(f"tokenizer.quantizer.codes={config.codes}; allowed: 2 or more")
    if config.gradient not in GRADIENTS:
        raise InputError(f"tokenizer.quantizer.gradient={config.gradient!r}; allowed: {', '.join(GRADIENTS)}")


def nearness(encodings: Tensor, codes: Tensor) -> Tensor:
    """Score [..., K] of each code [K, D], larger for nearer codes: (|encoding|² - distance²) / 2."""
    return encodings @ codes.T - codes.square().sum(-1) / 2


def lead(nearness: Tensor) -> Tensor:
    """Difference between the largest and the second largest value of the last dimension."""
    best = nearness.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def pulls(encodings: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Mean squared errors between encodings and codes: ``commitment`` trains the encoder, ``codebook`` the codes."""
    return {
        "commitment": functional.mse_loss(encodings, chosen.detach()),
        "codebook": functional.mse_loss(chosen, encodings.detach()),
    }


class NearestCode(Quantizer):
    """Vector quantization by the nearest of ``rows``. Features are projected to the width of the codes and back.

    Raises ValueError for fewer than two codes or an unknown gradient.
    """

    def __init__(self, config: CodebookConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        check_codebook(config)
        self.config = config
        self.fields = named_fields([config.codes])
        self.project_in = nn.Linear(width_in, config.code_dim)
        self.project_out = nn.Linear(config.code_dim, width_out)

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """The codes [K, D]."""

    def encodings(self, features: Tensor) -> Tensor:
        return self.project_in(features)

    def choose(self, encodings: Tensor) -> Tensor:
        return nearness(encodings, self.rows).argmax(-1, keepdim=True)

    def assign(self, encodings: Tensor) -> Tensor:
        """``choose`` for the forward pass; learned codebooks also start, revive and count codes here."""
        return self.choose(encodings)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            with torch.no_grad():
                ids = self.assign(encodings)
            chosen = self.chosen(ids)
            passed = GRADIENTS[self.config.gradient](encodings, chosen)
            return Quantized(self.project_out(passed), ids, pulls(encodings, chosen))

    def distances(self, encodings: Tensor) -> Tensor:
        """Half the difference between the squared distances to the second nearest and to the nearest code."""
        return lead(nearness(encodings, self.rows))

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return self.chosen(ids)

    def chosen(self, ids: Tensor) -> Tensor:
        """The rows [..., D] of ids [..., 1]."""
        return functional.embedding(ids[..., 0], self.rows)


class Codebook(nn.Module):
    """Codebook [K, D] trained by gradient; ``unit`` normalizes the rows.

    Rows are initialized with encodings of the first batch. A row whose average usage is near zero is replaced by an
    encoding of the current batch. Usage is summed over ranks and new rows come from rank 0, so codebooks stay bitwise
    equal.
    """

    usage: Tensor
    started: Tensor
    revived: Tensor
    passes: Tensor

    def __init__(self, config: LearnedCodebookConfig, unit: bool) -> None:
        super().__init__()
        self.config, self.unit = config, unit
        self.weight = nn.Parameter(functional.normalize(torch.randn(config.codes, config.code_dim), dim=-1))
        self.register_buffer("usage", torch.full((config.codes,), 1.0 / config.codes))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("revived", torch.zeros(config.codes, dtype=torch.bool), persistent=False)

    @property
    def rows(self) -> Tensor:
        """The codes [K, D]."""
        return functional.normalize(self.weight, dim=-1) if self.unit else self.weight

    @property
    def learns(self) -> bool:
        """True in training mode, unless the rows are frozen."""
        return self.training and self.weight.requires_grad

    @torch.no_grad()
    def start_or_revive(self, encodings: Tensor) -> None:
        """Replace all rows in the first pass, dead rows later, with encodings [..., D] of rank 0."""
        if not self.learns:
            return
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
        encodings = encodings.detach().flatten(0, -2)
        # add noise to new rows: two rows from one encoding would otherwise stay equal forever
        rows = encodings[torch.randint(len(encodings), (count,), device=encodings.device)]
        noise = 0.01 * torch.randn_like(rows)
        if self.unit:
            rows = functional.normalize(rows + noise, dim=-1)
        else:
            rows = rows + noise * encodings.square().mean().sqrt()
        self.weight.data[dead] = of_first_rank(rows)
        self.usage[dead] = 1.0 / self.config.codes
        self.revived |= dead
        self.started.fill_(True)

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Update the average usage with ids [...]."""
        if self.learns:
            counts = sum_over_ranks(torch.bincount(ids.flatten(), minlength=self.config.codes).float())
            self.usage.lerp_(counts / counts.sum(), 0.01)

    @torch.no_grad()
    def copy_revived(self, average: Codebook) -> None:
        """Copy rows that were revived since the last call into ``average``, the moving average of this codebook."""
        average.weight.data[self.revived] = self.weight.data[self.revived]
        self.revived.zero_()
