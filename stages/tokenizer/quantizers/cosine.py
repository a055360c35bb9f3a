"""ViT-VQGAN's codebook: codes and encodings of unit length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.tokenizer.quantizers.codebook import Codebook, LearnedCodebookConfig, check_codebook, lead, pulls
from stages.tokenizer.quantizers.gradients import GRADIENTS
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision, named_fields


@dataclass
class CosineVQConfig(LearnedCodebookConfig):
    """Factorised vector quantisation by cosine similarity."""

    kind: str = "cosine"


class CosineVQ(Quantizer):
    """Vector quantisation by cosine similarity, arXiv 2110.04627 section 3.2, its codebook trained by gradient.

    Raises ValueError for fewer than two codes.
    """

    def __init__(self, config: CosineVQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        check_codebook(config)
        self.config = config
        self.fields = named_fields([config.codes])
        self.project_in = nn.Linear(width_in, config.code_dim)
        self.project_out = nn.Linear(config.code_dim, width_out)
        self.codebook = Codebook(config, unit=True)

    def encodings(self, features: Tensor) -> Tensor:
        return functional.normalize(self.project_in(features), dim=-1)

    def choose(self, encodings: Tensor) -> Tensor:
        return (encodings @ self.codebook.rows.T).argmax(-1, keepdim=True)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            self.codebook.start_or_revive(encodings)
            with torch.no_grad():
                ids = self.choose(encodings)
            self.codebook.count(ids)
            chosen = functional.embedding(ids[..., 0], self.codebook.rows)
            passed = GRADIENTS[self.config.gradient](encodings, chosen)
            return Quantized(self.project_out(passed), ids, pulls(encodings, chosen))

    def distances(self, encodings: Tensor) -> Tensor:
        """Similarity (cosine) of the best code above that of the second best."""
        return lead(encodings @ self.codebook.rows.T)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return functional.embedding(ids[..., 0], self.codebook.rows)

    def copy_revived(self, average: Quantizer) -> None:
        assert isinstance(average, CosineVQ)
        self.codebook.copy_revived(average.codebook)
