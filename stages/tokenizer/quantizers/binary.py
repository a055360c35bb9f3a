"""Signs of a few numbers: lookup-free and binary spherical quantisation.

What is notable here:

- there is no codebook: 2^18 codes are 18 signs, two fields of 9 bits;
- an entropy term keeps all codes in use: each number should be sure of its sign, and all codes be used alike;
- given its numbers a token's signs are independent, so the first part is a sum over bits. The second is not: it is the
  entropy of the mean over tokens, taken over groups of bits, and no less than the joint one (subadditivity). The mean
  over a group's 2^g codes is one product of two matrices, of 2^(g/2) columns each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from stages.tokenizer.parts import LFQConfig
from stages.tokenizer.quantizers.digits import Digits, cut
from stages.tokenizer.quantizers.gradients import straight_through
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer, full_precision
from stages.tokenizer.quantizers.ranks import mean_over_ranks


class LFQ(Quantizer):
    """Lookup-free quantisation, arXiv 2310.05737: the signs of ``bits`` numbers.

    Encodings are numbers whose codes are -1 and 1. Raises ValueError for none.
    """

    def __init__(self, config: LFQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        for name in ("bits", "bits_per_field", "entropy_group_bits"):
            if getattr(config, name) < 1:
                raise InputError(f"tokenizer.quantizer.{name}={getattr(config, name)}; allowed: 1 or more")
        self.config = config
        self.digits = Digits([2] * config.bits, 2**config.bits_per_field)
        self.fields = self.digits.fields
        self.groups = cut([2] * config.bits, 2**config.entropy_group_bits)
        self.project_in = nn.Linear(width_in, config.bits)
        self.project_out = nn.Linear(config.bits, width_out)

    def encodings(self, features: Tensor) -> Tensor:
        return self.project_in(features)

    def choose(self, encodings: Tensor) -> Tensor:
        return self.digits.pack((encodings > 0).long())

    def scaled(self, signs: Tensor) -> Tensor:
        """The codes [..., bits] of signs -1 and 1."""
        return signs

    def forward(self, features: Tensor) -> Quantized:
        with full_precision(features.device):
            encodings = self.encodings(features.float())
            signs = torch.where(encodings > 0, 1.0, -1.0)
            losses = {
                "commitment": functional.mse_loss(encodings, signs),
                "entropy": entropy_loss(encodings, self.groups, self.config.temperature, self.training),
            }
            passed = self.project_out(self.scaled(straight_through(encodings, signs)))
            return Quantized(passed, self.choose(encodings), losses)

    def distances(self, encodings: Tensor) -> Tensor:
        """Distance to 0 of the number nearest to it."""
        return encodings.abs().amin(-1)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return self.scaled(self.digits.unpack(ids) * 2.0 - 1.0)


class BSQ(LFQ):
    """Binary spherical quantisation, arXiv 2406.07548: as LFQ, of numbers on the unit sphere.

    Codes are ±1/√bits, so every code has length 1 and no encoding is farther from its own than √2. Encodings are in
    units of 1/√bits here; the paper's inverse temperature is 2 bits / temperature.
    """

    def encodings(self, features: Tensor) -> Tensor:
        return functional.normalize(self.project_in(features), dim=-1) * self.config.bits**0.5

    def scaled(self, signs: Tensor) -> Tensor:
        return signs * self.config.bits**-0.5


def entropy_loss(numbers: Tensor, groups: Sequence[int], temperature: float, agree: bool) -> Tensor:
    """Mean entropy of a token's signs less the entropy of their mean, in nats (arXiv 2310.05737 and 2406.07548).

    Of ``numbers`` [..., bits]; the second part is summed over runs of bits of the lengths ``groups``. With ``agree``
    the mean is that of all ranks, which must call this together.
    """
    logits = numbers.flatten(0, -2) * (4 / temperature)
    positive = logits.sigmoid()
    own = (functional.softplus(logits) - logits * positive).sum(-1).mean()
    used = [mean_use(part) for part in positive.split(list(groups), dim=-1)]
    joined = torch.cat(used)
    mean = mean_over_ranks(joined) if agree else joined
    return own + (mean * mean.clamp_min(1e-12).log()).sum()


def mean_use(positive: Tensor) -> Tensor:
    """Mean probability [2^g] of every code, from the probability [M, g] that each bit is set."""
    half = positive.shape[1] // 2
    left, right = _products(positive[:, :half]), _products(positive[:, half:])
    return (left.T @ right).flatten() / len(positive)


def _products(positive: Tensor) -> Tensor:
    """Probability [M, 2^g] of every code of g bits."""
    made = positive.new_ones(len(positive), 1)
    for bit in positive.unbind(1):
        bit = bit.unsqueeze(1)
        made = torch.cat([made * (1 - bit), made * bit], dim=1)
    return made
