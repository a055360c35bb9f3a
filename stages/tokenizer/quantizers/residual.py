"""Residual vector quantisation: each codebook codes what the ones before it left."""

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
    """Residual vector quantisation by Euclidean distance (SoundStream, arXiv 2107.03312).

    Every stage has a codebook of its own, as there: what is left becomes smaller from stage to stage, so the codes of
    one say little of the next (RQ-VAE, arXiv 2203.01941, shares one). The losses are means over stages; the gradient
    passes once, from the sum of all codes to the encoding. A decoder that takes fewer fields is not part of the layout,
    so no stages are dropped in training. Raises ValueError for fewer than two codes or one stage.
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
        left, ids = encodings, []
        for codebook in self._stages():
            ids.append(nearness(left, codebook.rows).argmax(-1))
            left = left - functional.embedding(ids[-1], codebook.rows)
        return torch.stack(ids, dim=-1)

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            left, ids, losses = encodings, [], []
            for codebook in self._stages():
                codebook.start_or_revive(left)
                ids.append(nearness(left.detach(), codebook.rows.detach()).argmax(-1))
                codebook.count(ids[-1])
                chosen = functional.embedding(ids[-1], codebook.rows)
                losses.append(pulls(left, chosen))
                left = left - chosen.detach()
            passed = GRADIENTS[self.config.gradient](encodings, (encodings - left).detach())
            means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
            return Quantized(self.project_out(passed), torch.stack(ids, dim=-1), means)

    def distances(self, encodings: Tensor) -> Tensor:
        """Half the difference of the squared distances to the second best code and the best, of the closest stage."""
        left, found = encodings, []
        for codebook in self._stages():
            near = nearness(left, codebook.rows)
            found.append(lead(near))
            left = left - functional.embedding(near.argmax(-1), codebook.rows)
        return torch.stack(found).amin(0)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        parts = [functional.embedding(ids[..., index], each.rows) for index, each in enumerate(self._stages())]
        return torch.stack(parts).sum(0)

    def copy_revived(self, average: Quantizer) -> None:
        assert isinstance(average, ResidualVQ)
        for mine, averaged in zip(self._stages(), average._stages(), strict=True):
            mine.copy_revived(averaged)
