"""An image as f_low + f_high: Gaussians for the smooth part, complex wavelets and their products for the rest.

After Roddenberry et al., *INRs and the Algebra of Complex Wavelets* (ICLR 2024, arXiv 2310.00545). A polynomial of
wavelets is a sum of their products, and the spectrum of a product is the convolution of the spectra. Spectra in one
half of the plane stay there. Spectra of real wavelets are in both halves, so their products fall back to low
frequencies. Notes:

- The template exp(6 i u_x - |u|²) is a Morlet wavelet. An atom is the template at W r + b, with its own W and b. The
  energy of its spectrum is a Gaussian around the carrier 6 k with covariance kkᵀ + llᵀ, where k and l are the rows of
  W.
- For a real image half of the plane is sufficient, but two carriers in a half-plane may be nearly opposite. So there
  are two cones of carriers, within 45° of x and of y, each with its own network. With their mirror images, which the
  real part adds, they cover all directions. Two carriers of a cone are at most 90° apart, so |k + k'|² is at least
  |k|² + |k'|²: the frequency of a product is higher than those of its factors. This does not hold for wider cones.
- Training cannot leave a cone. When W is used, it is bounded so that the carrier is in its cone and not below the
  lowest frequency, and |l| is at most |k|. Then at most Φ(-6/√3) = 2.7e-4 of the energy of an atom is outside of the
  half-plane around the cone (at initialization, with l orthogonal to k, at most Φ(-6/√2) = 1.1e-5), and no more of the
  energy of a product. Sums may have a larger fraction outside, where atoms cancel.
- The networks of wavelets have no bias, since a constant is the lowest of all frequencies.

All of this holds for functions on the plane. Products reach 2^layers times the highest carrier, and frequencies above
half a cycle per pixel appear as lower frequencies on the grid of pixels (aliasing).
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
"""Frequency of the template in radians. The energy of its spectrum has a standard deviation of 1."""
GAUSSIANS = 8
"""Gaussians of f_low along the longer side."""
LOWEST = math.pi * GAUSSIANS / 2
"""Lowest carrier of f_high in radians per unit of the coordinates: the highest frequency that the Gaussians sample."""
OVERLAP = 0.7
"""Distance between neighboring Gaussians, in units of the distance at which they fall to 1/e."""
SQUARES = 4.0
"""Initial sum over layers of a in ρ(z) = z + a z²; each a is learned. In deep networks squares of squares would grow if
every layer had the a of a shallow network."""
FIRST_GAIN = 2.0
"""Initial gain of the first complex layer, larger than the usual 1 because only few atoms reach each place."""
SINGULAR_SHARE = 0.5
"""Fraction of atoms placed on singularities of the image, if it has enough; the others are placed at random."""
SINGULAR_OCTAVES = 2.0
"""Carriers of atoms on singularities are spread over this many octaves below that of their scale, since an edge is also
one at coarser scales."""


@dataclass(frozen=True)
class Placement:
    """Initial parameters of the F atoms of a cone."""

    carriers: Tensor
    """Radians per unit of the coordinates, [F]."""
    angles: Tensor
    """Angle from the axis of the cone, within ±π/4, [F]."""
    places: Tensor
    """Centers of the envelopes in coordinates (x, y), [F, 2]."""


def highest_carrier(size: tuple[int, int]) -> float:
    """Nyquist frequency of an image of ``size`` (height, width) in radians per coordinate unit, at least LOWEST."""
    return max(math.pi * max(size) / 2, LOWEST)


def placed_anywhere(count: int, size: tuple[int, int]) -> Placement:
    """Atoms at random places of an image of ``size`` (height, width), uniform over directions and octaves."""
    height, width = size
    carriers = LOWEST * (highest_carrier(size) / LOWEST) ** torch.rand(count)
    extent = torch.tensor([width, height]) / max(size)
    return Placement(carriers, (torch.rand(count) - 0.5) * math.pi / 2, (2 * torch.rand(count, 2) - 1) * extent)


def placed_on_singularities(image: Tensor, count: int, axis: int) -> Placement:
    """SINGULAR_SHARE of the atoms on singularities of ``image`` [C, H, W] whose direction is in the cone of ``axis``.

    Singularities are drawn without replacement, with probability proportional to the modulus. An atom has the direction
    of the gradient. At scale 2^j pixels, its carrier has a wavelength of 2^(j + 1) pixels or up to SINGULAR_OCTAVES
    longer. If there are too few singularities, more atoms are placed at random.
    """
    size = image.shape[-2], image.shape[-1]
    singularities = find_singularities(image)
    # in the coordinates of a cone its axis comes first
    along, across = singularities.directions[:, axis], singularities.directions[:, 1 - axis]
    in_cone = along.abs() >= across.abs() if axis == 0 else along.abs() > across.abs()
    # weighted sampling by Efraimidis and Spirakis: take the smallest exponential waiting times with these rates
    waits = torch.empty(int(in_cone.sum())).exponential_() / singularities.moduli[in_cone]
    chosen = in_cone.nonzero()[:, 0][waits.argsort()[: round(SINGULAR_SHARE * count)]]
    lengths = singularities.scales[chosen] * 2 ** (SINGULAR_OCTAVES * torch.rand(len(chosen)))
    carriers = (highest_carrier(size) / lengths).clamp(min=LOWEST)
    rest = placed_anywhere(count - len(chosen), size)
    return Placement(
        torch.cat((carriers, rest.carriers)),
        torch.cat(((across / along)[chosen].atan(), rest.angles)),
        torch.cat((singularities.places[chosen], rest.places)),
    )


class ProgressiveAtoms(nn.Module):
    """Complex wavelets of coordinates [P, 2], each with its own affine map: pairs [P, F] with spectra in one cone.

    ``axis`` is the axis of the cone: 0 for x, 1 for y.
    """

    def __init__(self, placement: Placement, axis: int) -> None:
        super().__init__()
        self.axis = axis
        directions = torch.stack((placement.angles.cos(), placement.angles.sin()), dim=-1)
        across = torch.stack((-directions[:, 1], directions[:, 0]), dim=-1)
        scales = placement.carriers[:, None, None] / CARRIER
        self.weight = nn.Parameter(torch.stack((directions, across), dim=1) * scales)
        places = placement.places.flip(-1) if axis else placement.places
        self.bias = nn.Parameter(-(self.weight.detach() @ places[:, :, None])[:, :, 0])

    def maps(self) -> Tensor:
        """The bounded W of every atom, [F, 2, 2], for coordinates in which the axis of the cone comes first."""
        first, second = self.weight.unbind(dim=1)
        along = torch.maximum(first[:, 0], first[:, 1].abs()).clamp(min=1e-6)
        first = torch.stack((along, first[:, 1]), dim=-1)
        first = first * (LOWEST / CARRIER / first.norm(dim=-1, keepdim=True)).clamp(min=1)
        max_scale = first.norm(dim=-1, keepdim=True) / second.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return torch.stack((first, second * max_scale.clamp(max=1)), dim=1)

    def forward(self, coordinates: Tensor) -> Pair:
        ordered = coordinates.flip(-1) if self.axis else coordinates
        u = functional.linear(ordered, self.maps().flatten(0, 1), self.bias.flatten()).unflatten(-1, (-1, 2))
        size, phase = faded(-u.square().sum(dim=-1)), CARRIER * u[..., 0]
        return size * phase.cos(), size * phase.sin()


class ProgressiveNetwork(nn.Module):
    """Polynomials of degree 2^``layers`` of the atoms of one cone: coordinates [P, 2] → pairs [P, channels]."""

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
    """f_low: a weighted sum of Gaussians, each with its own affine map, and a constant: [P, 2] → [P, channels].

    Initially they are isotropic and on a grid. The norm of W is bounded to LOWEST / 3 when it is used, so that 99.7 %
    of the energy of a Gaussian stays below the carriers of the wavelets.
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
    """f_low + the real part of f_high: coordinates [P, 2] → colors [P, channels].

    A cone has ``hidden`` atoms. The width of its complex layers is chosen so that the model has about as many
    parameters as a real network with ``layers`` layers of width ``hidden``. Atoms cost only six numbers each, and they
    represent the image.
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
