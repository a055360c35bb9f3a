"""SimVQ: a frozen random codebook with a learned linear map, which moves all codes together, so that none dies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.tokenizer.parts import SimVQConfig
from stages.tokenizer.quantizers.codebook import NearestCode


class SimVQ(NearestCode):
    """Vector quantization by Euclidean distance to the rows of C W + b, arXiv 2411.02038.

    C is drawn from a normal distribution and frozen. W and b are learned, starting from the identity and zero. Raises
    ValueError for fewer than two codes or an unknown gradient.
    """

    frozen: Tensor

    def __init__(self, config: SimVQConfig, width_in: int, width_out: int) -> None:
        super().__init__(config, width_in, width_out)
        self.register_buffer("frozen", torch.randn(config.codes, config.code_dim) * config.code_dim**-0.5)
        self.map = nn.Linear(config.code_dim, config.code_dim)
        nn.init.eye_(
            self.map.weight
        )  # codes start as C, with the length of encodings; PyTorch's default would halve them
        nn.init.zeros_(self.map.bias)

    @property
    def rows(self) -> Tensor:
        return self.map(self.frozen)

    def chosen(self, ids: Tensor) -> Tensor:
        return self.map(functional.embedding(ids[..., 0], self.frozen))
