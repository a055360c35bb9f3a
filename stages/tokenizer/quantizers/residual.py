"""Residual vector quantization: each codebook encodes the residual of the previous ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from stages.tokenizer.parts import ResidualVQConfig
from stages.tokenizer.quantizers.codebook import Codebook, check_codebook, lead, nearness, pulls
from stages.tokenizer.quantizers.gradients import GRADIENTS
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision, named_fields


class ResidualVQ(Quantizer):
    """Residual vector quantization by Euclidean distance (SoundStream, arXiv 2107.03312).

    As in SoundStream, every stage has its own codebook: residuals become smaller from stage to stage, so codes of one
    stage do not suit the next (RQ-VAE, arXiv 2203.01941, shares one codebook). The losses are means over stages. The
    gradient passes once, from the sum of all codes to the encoding. The layout does not support decoding with fewer
    fields, so training drops no stages. Raises ValueError for fewer than two codes or one stage, and for an unknown
    gradient.
    """

    def __init__(self, config: ResidualVQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        check_codebook(config)
        if config.depth < 1:
            raise InputError(f"tokenizer.quantizer.depth={config.depth}; allowed: 1 or more")
        self.config = config
        self.fields = named_fields([config.codes] * config.depth)
        self.project_in = nn.Linear(width_in, config.code_dim)
        self.project_out = nn.Linear(config.code_dim, width_out)
        self.codebooks = nn.ModuleList([Codebook(config, unit=False) for _ in range(config.depth)])

    def encodings(self, features: Tensor) -> Tensor:
        return self.project_in(features)

    def _stages(self) -> list[Codebook]:
        return list(self.codebooks)  # type: ignore[arg-type]

    def choose(self, encodings: Tensor) -> Tensor:
        residual, ids = encodings, []
        for codebook in self._stages():
            ids.append(nearness(residual, codebook.rows).argmax(-1))
            residual = residual - functional.embedding(ids[-1], codebook.rows)
        return torch.stack(ids, dim=-1)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            residual, ids, losses = encodings, [], []
            for codebook in self._stages():
                codebook.start_or_revive(residual)
                ids.append(nearness(residual.detach(), codebook.rows.detach()).argmax(-1))
                codebook.count(ids[-1])
                chosen = functional.embedding(ids[-1], codebook.rows)
                losses.append(pulls(residual, chosen))
                residual = residual - chosen.detach()
            passed = GRADIENTS[self.config.gradient](encodings, (encodings - residual).detach())
            means = {name: torch.stack([stage_losses[name] for stage_losses in losses]).mean() for name in losses[0]}
            return Quantized(self.project_out(passed), torch.stack(ids, dim=-1), means)

    def distances(self, encodings: Tensor) -> Tensor:
        """Half the difference between the squared distances to the second nearest and to the nearest code, at the stage
        where it is smallest."""
        residual, margins = encodings, []
        for codebook in self._stages():
            scores = nearness(residual, codebook.rows)
            margins.append(lead(scores))
            residual = residual - functional.embedding(scores.argmax(-1), codebook.rows)
        return torch.stack(margins).amin(0)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        parts = [functional.embedding(ids[..., index], codebook.rows) for index, codebook in enumerate(self._stages())]
        return torch.stack(parts).sum(0)

    def copy_revived(self, average: Quantizer) -> None:
        assert isinstance(average, ResidualVQ)
        for own, averaged in zip(self._stages(), average._stages(), strict=True):
            own.copy_revived(averaged)
