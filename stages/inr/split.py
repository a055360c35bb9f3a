"""An image as f_low + f_high: Gaussians for what is smooth, complex wavelets and their products for the rest.

After Roddenberry et al., *INRs and the Algebra of Complex Wavelets* (ICLR 2024, arXiv 2310.00545). A polynomial of
wavelets is a sum of their products, and the spectrum of a product is the convolution of spectra. Spectra on one side of
the plane stay there; those of real wavelets lie on both sides, and their products fall back to low frequencies. What is
notable here:

- the template exp(6 i u_x - |u|²) is Morlet's; an atom is the template of W r + b, with W and b its own. The energy of
  its spectrum is a Gaussian around the carrier 6 k, of covariance kkᵀ + llᵀ, where k and l are the rows of W;
- of a real image half the plane is enough, but in a half-plane two carriers may be nearly opposite. So there are two
  cones of carriers, within 45° of x and of y, each with a network of its own: with their mirror images, which the real
  part adds, they cover all directions. No two carriers of a cone are more than 90° apart, so |k + k'|² is at least
  |k|² + |k'|²: a product lies higher than both its factors. Wider cones do not have that;
- training cannot leave a cone: W is bounded as it is used, so that the carrier is in its cone and not below the lowest
  frequency, and |l| is at most |k|. Then at most Φ(-6/√3) = 2.7e-4 of the energy of an atom lies beyond the half-plane
  around the cone (as atoms begin, with l across k, Φ(-6/√2) = 1.1e-5 or less), and of a product no more than that.
  Sums may have a larger share, where the atoms cancel;
- nothing in the wavelets' networks has a bias: a constant is the lowest frequency of all.

All this is said of functions of the plane. Products reach 2^layers times the highest carrier, and what is beyond half a
cycle a pixel looks like a lower frequency on the pixels' own grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.inr.pairs import ComplexLinear, Pair, faded, polynomial
from stages.inr.singularities import find_singularities

CARRIER = 6.0
"""Frequency of the template in radians; its envelope has a deviation of 1 in the energy of its spectrum."""
GAUSSIANS = 8
"""Gaussians of f_low along the longer side."""
LOWEST = math.pi * GAUSSIANS / 2
"""Lowest carrier of f_high in radians per unit of the coordinates: the highest frequency that the Gaussians sample."""
OVERLAP = 0.7
"""Distance between neighbouring Gaussians, in the lengths at which they have fallen to 1/e."""
SQUARES = 4.0
"""Sum over the layers of a in ρ(z) = z + a z², at the start; it is learned. In deep networks squares of squares would
grow if every layer had as much as a shallow one's."""
FIRST_GAIN = 2.0
"""How much wider than usual the first complex layer begins: few atoms reach any one place."""
SINGULAR_SHARE = 0.5
"""Share of the atoms on singularities of the image, where it has so many; the others lie anywhere."""
SINGULAR_OCTAVES = 2.0
"""Octaves below that of their scale over which the carriers of atoms on singularities are spread: an edge is one at
coarser scales, too."""


@dataclass(frozen=True)
class Placement:
    """How the F atoms of a cone begin."""

    carriers: Tensor
    """Radians per unit of the coordinates, [F]."""
    angles: Tensor
    """From the cone's axis, within ±π/4, [F]."""
    places: Tensor
    """Middles of the envelopes in coordinates (x, y), [F, 2]."""


def highest_carrier(size: tuple[int, int]) -> float:
    """Radians per unit of the coordinates at which an image of ``size`` (height, width) alternates from pixel to pixel.

    Never less than LOWEST.
    """
    return max(math.pi * max(size) / 2, LOWEST)


def placed_anywhere(count: int, size: tuple[int, int]) -> Placement:
    """Atoms at random places of an image of ``size`` (height, width), of all directions, the same number an octave."""
    height, width = size
    carriers = LOWEST * (highest_carrier(size) / LOWEST) ** torch.rand(count)
    extent = torch.tensor([width, height]) / max(size)
    return Placement(carriers, (torch.rand(count) - 0.5) * math.pi / 2, (2 * torch.rand(count, 2) - 1) * extent)


def placed_on_singularities(image: Tensor, count: int, axis: int) -> Placement:
    """SINGULAR_SHARE of the atoms on singularities of ``image`` [C, H, W] whose direction is in the cone of ``axis``.

    Drawn by modulus, without replacement. An atom is turned as the gradient; one of scale 2^j pixels has a carrier
    between 2^(j + 1) pixels' length and SINGULAR_OCTAVES below. Where there are fewer singularities, more atoms lie
    anywhere.
    """
    size = image.shape[-2], image.shape[-1]
    found = find_singularities(image)
    # in a cone's own coordinates its axis comes first
    along, across = found.directions[:, axis], found.directions[:, 1 - axis]
    inside = along.abs() >= across.abs() if axis == 0 else along.abs() > across.abs()
    # Efraimidis and Spirakis: the smallest of waiting times with such rates
    waits = torch.empty(int(inside.sum())).exponential_() / found.moduli[inside]
    chosen = inside.nonzero()[:, 0][waits.argsort()[: round(SINGULAR_SHARE * count)]]
    lengths = found.scales[chosen] * 2 ** (SINGULAR_OCTAVES * torch.rand(len(chosen)))
    carriers = (highest_carrier(size) / lengths).clamp(min=LOWEST)
    rest = placed_anywhere(count - len(chosen), size)
    return Placement(
        torch.cat((carriers, rest.carriers)),
        torch.cat(((across / along)[chosen].atan(), rest.angles)),
        torch.cat((found.places[chosen], rest.places)),
    )


class ProgressiveAtoms(nn.Module):
    """Complex wavelets of coordinates [P, 2], each with its own affine map: pairs [P, F] with a spectrum in one cone.

    ``axis`` is the cone's: 0 for x, 1 for y.
    """

    def __init__(self, placement: Placement, axis: int) -> None:
        super().__init__()
        self.axis = axis
        turned = torch.stack((placement.angles.cos(), placement.angles.sin()), dim=-1)
        across = torch.stack((-turned[:, 1], turned[:, 0]), dim=-1)
        scales = placement.carriers[:, None, None] / CARRIER
        self.weight = nn.Parameter(torch.stack((turned, across), dim=1) * scales)
        places = placement.places.flip(-1) if axis else placement.places
        self.bias = nn.Parameter(-(self.weight.detach() @ places[:, :, None])[:, :, 0])

    def maps(self) -> Tensor:
        """W of every atom as it is used, [F, 2, 2], for coordinates in which the cone's axis comes first."""
        first, second = self.weight.unbind(dim=1)
        along = torch.maximum(first[:, 0], first[:, 1].abs()).clamp(min=1e-6)
        first = torch.stack((along, first[:, 1]), dim=-1)
        first = first * (LOWEST / CARRIER / first.norm(dim=-1, keepdim=True)).clamp(min=1)
        room = first.norm(dim=-1, keepdim=True) / second.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return torch.stack((first, second * room.clamp(max=1)), dim=1)

    def forward(self, coordinates: Tensor) -> Pair:
        own = coordinates.flip(-1) if self.axis else coordinates
        u = functional.linear(own, self.maps().flatten(0, 1), self.bias.flatten()).unflatten(-1, (-1, 2))
        size, phase = faded(-u.square().sum(dim=-1)), CARRIER * u[..., 0]
        return size * phase.cos(), size * phase.sin()


class ProgressiveNetwork(nn.Module):
    """Polynomials of one cone's atoms, of degree 2^``layers``: coordinates [P, 2] → pairs [P, channels]."""

    def __init__(self, atoms: ProgressiveAtoms, width: int, layers: int, channels: int) -> None:
        super().__init__()
        self.atoms = atoms
        inputs = len(atoms.bias)
        self.hidden = nn.ModuleList(
            [
                ComplexLinear(width if layer else inputs, width, bias=False, gain=1.0 if layer else FIRST_GAIN)
                for layer in range(layers)
            ]
        )
        self.squares = nn.Parameter(torch.full((layers,), SQUARES / layers))
        self.last = ComplexLinear(width, channels, bias=False)

    def forward(self, coordinates: Tensor) -> Pair:
        z = self.atoms(coordinates)
        for layer, square in zip(self.hidden, self.squares, strict=True):
            z = polynomial(layer(z), square)
        return self.last(z)


class GaussianNetwork(nn.Module):
    """f_low: a weighted sum of Gaussians, each of its own affine map, and a constant: [P, 2] → [P, channels].

    They begin as round ones on a grid. W is bounded, as it is used, to a norm of LOWEST / 3, so that 99.7 % of the
    energy of a Gaussian stays below the wavelets' carriers.
    """

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        super().__init__()
        height, width = (max(1, round(GAUSSIANS * side / max(size))) for side in size)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack((2 * x + 1 - width, 2 * y + 1 - height), dim=-1).reshape(-1, 2) / GAUSSIANS
        scale = OVERLAP * GAUSSIANS / 2
        self.weight = nn.Parameter(scale * torch.eye(2).repeat(len(places), 1, 1))
        self.bias = nn.Parameter(-scale * places)
        self.last = nn.Linear(len(places), channels)

    def forward(self, coordinates: Tensor) -> Tensor:
        norm = self.weight.flatten(1).norm(dim=-1)[:, None, None]
        maps = self.weight * (LOWEST / 3 / norm.clamp(min=1e-6)).clamp(max=1)
        u = functional.linear(coordinates, maps.flatten(0, 1), self.bias.flatten()).unflatten(-1, (-1, 2))
        return self.last(faded(-u.square().sum(dim=-1)))


class Split(nn.Module):
    """f_low + the real part of f_high: coordinates [P, 2] → colours [P, channels].

    A cone has as many atoms as ``hidden``, and complex layers so narrow that the whole has about as many parameters as
    a real network with ``layers`` layers of ``hidden``: atoms cost six numbers each, and it is they that see the image.
    """

    def __init__(self, hidden: int, layers: int, image: Tensor, singular: bool) -> None:
        super().__init__()
        channels, size = image.shape[0], (image.shape[1], image.shape[2])
        # the positive root of hidden · w + (layers - 1) w² = layers · hidden² / 4
        width = round(layers * hidden / 2 / (1 + math.sqrt(1 + layers * (layers - 1))))
        self.low = GaussianNetwork(size, channels)
        self.high = nn.ModuleList()
        for axis in (0, 1):
            placement = placed_on_singularities(image, hidden, axis) if singular else placed_anywhere(hidden, size)
            self.high.append(ProgressiveNetwork(ProgressiveAtoms(placement, axis), max(1, width), layers, channels))

    def forward(self, coordinates: Tensor) -> Tensor:
        total = self.low(coordinates)
        for network in self.high:
            total = total + network(coordinates)[0]
        return total
