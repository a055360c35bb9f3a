"""Quantization by signs: lookup-free and binary spherical quantization.

- There is no codebook: 2^18 codes are 18 signs, in two fields of 9 bits.
- An entropy loss keeps all codes in use. It makes each sign certain and the usage of codes uniform.
- The signs of a token are independent given its numbers, so the first term is a sum over bits. The second term, the
  entropy of the mean over tokens, is not. It is computed per group of bits and summed, which is an upper bound of the
  joint entropy (subadditivity). The mean over the 2^g codes of a group is one product of two matrices with 2^(g/2)
  columns each.
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
    """Lookup-free quantization, arXiv 2310.05737: the signs of ``bits`` numbers.

    Encodings are these numbers; codes are -1 and 1. Raises ValueError for ``bits``, ``bits_per_field`` or
    ``entropy_group_bits`` below 1.
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
        """Codes [..., bits] from signs -1 and 1."""
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
        """Distance to 0 of the smallest number in absolute value."""
        return encodings.abs().amin(-1)

    def codes(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        return self.scaled(self.digits.unpack(ids) * 2.0 - 1.0)


class BSQ(LFQ):
    """Binary spherical quantization, arXiv 2406.07548: LFQ of numbers on the unit sphere.

    Codes are ±1/√bits, so every code has length 1, and the distance of an encoding to its code is at most √2. Encodings
    here are in units of 1/√bits. The paper's inverse temperature is 2 bits / temperature.
    """

    def encodings(self, features: Tensor) -> Tensor:
        return functional.normalize(self.project_in(features), dim=-1) * self.config.bits**0.5

    def scaled(self, signs: Tensor) -> Tensor:
        return signs * self.config.bits**-0.5


def entropy_loss(numbers: Tensor, groups: Sequence[int], temperature: float, agree: bool) -> Tensor:
    """Mean entropy of the signs of a token minus the entropy of their mean, in nats (arXiv 2310.05737 and 2406.07548).

    ``numbers`` are [..., bits]. The second term is summed over consecutive groups of bits with lengths ``groups``. With
    ``agree`` the mean is over all ranks, which must all call this.
    """
    logits = numbers.flatten(0, -2) * (4 / temperature)
    positive = logits.sigmoid()
    token_entropy = (functional.softplus(logits) - logits * positive).sum(-1).mean()
    usage = [mean_use(part) for part in positive.split(list(groups), dim=-1)]
    local_mean = torch.cat(usage)
    mean = mean_over_ranks(local_mean) if agree else local_mean
    return token_entropy + (mean * mean.clamp_min(1e-12).log()).sum()


def mean_use(positive: Tensor) -> Tensor:
    """Mean probability [2^g] of every code, from the probabilities [M, g] that each bit is set."""
    half = positive.shape[1] // 2
    left, right = _products(positive[:, :half]), _products(positive[:, half:])
    return (left.T @ right).flatten() / len(positive)


def _products(positive: Tensor) -> Tensor:
    """Probability [M, 2^g] of every code of g bits."""
    products = positive.new_ones(len(positive), 1)
    for bit in positive.unbind(1):
        bit = bit.unsqueeze(1)
        products = torch.cat([products * (1 - bit), products * bit], dim=1)
    return products
