"""Coordinate networks without a split of frequencies: random Fourier features, SIREN, real and complex WIRE.

Each maps coordinates float32 [P, 2] from ``stages.inr.fit.coordinates`` to colors [P, channels].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stages.inr.pairs import ComplexLinear, faded, gabor

FOURIER_SCALE = 5.0
"""Standard deviation of the random frequencies in cycles per unit of the coordinates. Tancik et al. 2020 (arXiv
2006.10739) found 10 best for images with side 1; here the side is 2."""
SIREN_FREQUENCY = 30.0
"""w0 of Sitzmann et al. 2020 (arXiv 2006.09661)."""
WIRE_FREQUENCY = 20.0
"""w0 of WIRE (arXiv 2301.05187) for images."""
WIRE_WIDTH = 30.0
"""s0 of WIRE for images."""


class FourierRelu(nn.Module):
    """A ReLU network on ``hidden`` random sines and cosines, which replace the first layer."""

    frequencies: Tensor

    def __init__(self, hidden: int, layers: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * FOURIER_SCALE * torch.randn(hidden // 2, 2))
        widths = [2 * (hidden // 2), *[hidden] * layers]
        parts: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.network = nn.Sequential(*parts, nn.Linear(widths[-1], channels))

    def forward(self, coordinates: Tensor) -> Tensor:
        phase = coordinates @ self.frequencies.T
        return self.network(torch.cat((phase.cos(), phase.sin()), dim=-1))


class Siren(nn.Module):
    """Sines of linear layers, initialized as by Sitzmann et al. 2020 (section 3.2 and their code).

    Initial weights are uniform: within ±1/inputs in the first layer, within ±sqrt(6/inputs)/w0 in the others.
    """

    def __init__(self, hidden: int, layers: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, hidden)
        self.hidden = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers)])
        self.last = nn.Linear(hidden, channels)
        nn.init.uniform_(self.first.weight, -1 / 2, 1 / 2)
        bound = math.sqrt(6 / hidden) / SIREN_FREQUENCY
        for layer in (*self.hidden, self.last):
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, coordinates: Tensor) -> Tensor:
        x = coordinates
        for layer in (self.first, *self.hidden):
            x = (SIREN_FREQUENCY * layer(x)).sin()
        return self.last(x)


class WireReal(nn.Module):
    """WIRE with real numbers: cos(w0 z) · exp(-(s0 z)²) of linear layers."""

    def __init__(self, hidden: int, layers: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, hidden), *(nn.Linear(hidden, hidden) for _ in range(layers))])
        self.last = nn.Linear(hidden, channels)

    def forward(self, coordinates: Tensor) -> Tensor:
        x = coordinates
        for layer in self.layers:
            z = layer(x)
            x = (WIRE_FREQUENCY * z).cos() * faded(-(WIRE_WIDTH * z).square())
        return self.last(x)


class Wire(nn.Module):
    """WIRE: complex Gabor wavelets of linear layers. The first layer is real, the others complex. The output is real.

    The complex width is ``hidden`` / sqrt(2), which gives as many parameters as a real network of width ``hidden``.
    """

    def __init__(self, hidden: int, layers: int, channels: int) -> None:
        super().__init__()
        width = int(hidden / math.sqrt(2))
        self.first = nn.Linear(2, width)
        self.hidden = nn.ModuleList([ComplexLinear(width, width) for _ in range(layers)])
        self.last = ComplexLinear(width, channels)

    def forward(self, coordinates: Tensor) -> Tensor:
        z = self.first(coordinates)
        pair = gabor((z, torch.zeros_like(z)), WIRE_FREQUENCY, WIRE_WIDTH)
        for layer in self.hidden:
            pair = gabor(layer(pair), WIRE_FREQUENCY, WIRE_WIDTH)
        return self.last(pair)[0]
