"""Complex numbers as pairs (real part, imaginary part) of real tensors: half precision and compilers know these."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[Tensor, Tensor]

FAINTEST = -40.0
"""Logarithm of the smallest envelope: with those below it, and with their gradients, processors calculate in denormal
numbers, dozens of times slower."""


def faded(exponent: Tensor) -> Tensor:
    """exp(exponent), where that is more than e^-40, and e^-40 elsewhere."""
    return exponent.clamp(min=FAINTEST).exp()


class ComplexLinear(nn.Module):
    """z → W z + b on pairs [..., inputs] → [..., outputs].

    Real and imaginary parts begin uniform within ±``gain``/sqrt(inputs); 1 is what ``torch.nn.Linear`` has for complex
    numbers.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        bound = gain / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(2, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, z: Pair) -> Pair:
        real, imaginary = z
        weight, turned = self.weight
        bias = (None, None) if self.bias is None else self.bias
        return (
            functional.linear(real, weight, bias[0]) - functional.linear(imaginary, turned),
            functional.linear(real, turned, bias[1]) + functional.linear(imaginary, weight),
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
