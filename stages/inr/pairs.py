"""Complex numbers as pairs (real part, imaginary part) of real tensors, which support half precision and compilers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[Tensor, Tensor]

FAINTEST = -40.0
"""Logarithm of the smallest envelope. Smaller envelopes or their gradients are denormal numbers, with which processors
are dozens of times slower."""


def faded(exponent: Tensor) -> Tensor:
    """exp(exponent), at least e^-40."""
    return exponent.clamp(min=FAINTEST).exp()


class ComplexLinear(nn.Module):
    """z → W z + b on pairs [..., inputs] → [..., outputs].

    Real and imaginary parts are initialized uniformly within ±``gain``/sqrt(inputs). A gain of 1 equals
    ``torch.nn.Linear`` for complex numbers.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        bound = gain / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(2, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, z: Pair) -> Pair:
        real, imaginary = z
        weight, imaginary_weight = self.weight
        bias = (None, None) if self.bias is None else self.bias
        return (
            functional.linear(real, weight, bias[0]) - functional.linear(imaginary, imaginary_weight),
            functional.linear(real, imaginary_weight, bias[1]) + functional.linear(imaginary, weight),
        )


def gabor(z: Pair, frequency: float, width: float) -> Pair:
    """exp(i · ``frequency`` · z - |``width`` · z|²) of complex z (WIRE, arXiv 2301.05187)."""
    real, imaginary = z
    size = faded(-frequency * imaginary - width**2 * (real.square() + imaginary.square()))
    return size * (frequency * real).cos(), size * (frequency * real).sin()


def polynomial(z: Pair, weight: Tensor) -> Pair:
    """z + ``weight`` · z² for a real weight."""
    real, imaginary = z
    return (
        real + weight * (real.square() - imaginary.square()),
        imaginary + 2 * weight * real * imaginary,
    )
