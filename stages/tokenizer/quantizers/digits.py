"""Ids of several digits, grouped into fields that a prior predicts one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import Field
from stages.tokenizer.quantizers.quantizer import named_fields


def cut(sizes: Sequence[int], most: int) -> list[int]:
    """Split ``sizes`` into the fewest runs with products of at most ``most``, and return the lengths of the runs.

    Among these splits it chooses the one with the smallest largest product: 18 twos with 2^10 give 9 and 9, not 10 and
    8. Raises ValueError for a size above ``most``.
    """
    if max(sizes) > most:
        raise InputError(f"{max(sizes)} values of one number; allowed: at most {most}")

    def greedy(limit: int) -> list[int]:
        lengths, product = [0], 1
        for size in sizes:
            if product * size > limit:
                lengths, product = [*lengths, 0], 1
            lengths[-1] += 1
            product *= size
        return lengths

    places = range(len(sizes))
    products = {math.prod(sizes[start : stop + 1]) for start in places for stop in places[start:]}
    fewest = len(greedy(most))
    limits = sorted(product for product in products if max(sizes) <= product <= most)
    return next(lengths for lengths in map(greedy, limits) if len(lengths) == fewest)


class Digits(nn.Module):
    """Digits int64 [..., D], each from 0 to its size - 1 ↔ ids int64 [..., F], least significant digit first."""

    sizes: Tensor
    strides: Tensor
    field_of: Tensor

    def __init__(self, sizes: Sequence[int], most: int) -> None:
        super().__init__()
        self.lengths = cut(sizes, most)
        strides, field_of, vocabularies = [], [], []
        start = 0
        for index, length in enumerate(self.lengths):
            part = sizes[start : start + length]
            strides += [math.prod(part[:place]) for place in range(length)]
            field_of += [index] * length
            vocabularies.append(math.prod(part))
            start += length
        self.fields: tuple[Field, ...] = named_fields(vocabularies)
        for name, values in (("sizes", list(sizes)), ("strides", strides), ("field_of", field_of)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def pack(self, digits: Tensor) -> Tensor:
        """Convert digits to ids."""
        parts = (digits * self.strides).split(self.lengths, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1)

    def unpack(self, ids: Tensor) -> Tensor:
        """Convert ids to digits."""
        return (ids[..., self.field_of] // self.strides) % self.sizes
