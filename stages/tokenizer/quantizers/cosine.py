"""The quantizer of ViT-VQGAN: codes and encodings of unit length."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from stages.tokenizer.parts import CosineVQConfig
from stages.tokenizer.quantizers.codebook import Codebook, NearestCode
from stages.tokenizer.quantizers.quantizer import Quantizer


class CosineVQ(NearestCode):
    """Vector quantization by cosine similarity, arXiv 2110.04627 section 3.2, with a codebook trained by gradient.

    On the unit sphere the nearest code is the most similar one, and ``distances`` are differences of similarity. Raises
    ValueError for fewer than two codes or an unknown gradient.
    """

    def __init__(self, config: CosineVQConfig, width_in: int, width_out: int) -> None:
        super().__init__(config, width_in, width_out)
        self.codebook = Codebook(config, unit=True)

    @property
    def rows(self) -> Tensor:
        return self.codebook.rows

    def encodings(self, features: Tensor) -> Tensor:
        return functional.normalize(super().encodings(features), dim=-1)

    def assign(self, encodings: Tensor) -> Tensor:
        self.codebook.start_or_revive(encodings)
        ids = self.choose(encodings)
        self.codebook.count(ids)
        return ids

    def copy_revived(self, average: Quantizer) -> None:
        assert isinstance(average, CosineVQ)
        self.codebook.copy_revived(average.codebook)
