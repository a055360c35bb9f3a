"""SimVQ: a frozen random codebook that one learned linear map moves as a whole, so that no code stays behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.tokenizer.quantizers.codebook import CodebookConfig, check_codebook, lead, nearness, pulls
from stages.tokenizer.quantizers.gradients import GRADIENTS
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision, named_fields


@dataclass
class SimVQConfig(CodebookConfig):
    """A frozen codebook under a learned linear map."""

    kind: str = "simvq"


class SimVQ(Quantizer):
    """Vector quantisation by Euclidean distance to the rows of C W + b, arXiv 2411.02038: C is normal and stays
    as it was drawn, W and b are learned from the identity and zero.

    Raises ValueError for fewer than two codes.
    """

    frozen: Tensor

    def __init__(self, config: SimVQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        check_codebook(config)
        self.config = config
        self.fields = named_fields([config.codes])
        self.project_in = nn.Linear(width_in, config.code_dim)
        self.project_out = nn.Linear(config.code_dim, width_out)
        self.register_buffer("frozen", torch.randn(config.codes, config.code_dim) * config.code_dim**-0.5)
        self.map = nn.Linear(config.code_dim, config.code_dim)
        nn.init.eye_(self.map.weight)  # codes begin as C, as long as encodings; torch's own W would halve them
        nn.init.zeros_(self.map.bias)

    @property
    def rows(self) -> Tensor:
        """The codes [K, D]."""
        return self.map(self.frozen)

    def encodings(self, features: Tensor) -> Tensor:
        return self.project_in(features)

    def choose(self, encodings: Tensor) -> Tensor:
        return nearness(encodings, self.rows).argmax(-1, keepdim=True)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            with torch.no_grad():
                ids = self.choose(encodings)
            chosen = self.map(functional.embedding(ids[..., 0], self.frozen))
            passed = GRADIENTS[self.config.gradient](encodings, chosen)
            return Quantized(self.project_out(passed), ids, pulls(encodings, chosen))

    def distances(self, encodings: Tensor) -> Tensor:
        """Half the difference of the squared distances to the second best code and the best."""
        return lead(nearness(encodings, self.rows))

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return self.map(functional.embedding(ids[..., 0], self.frozen))
