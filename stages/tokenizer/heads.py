"""A decoder for any resolution: what the tokenizer knows of each place, as a sum of wavelets around it.

features and decoded pixels → a map of cells → for every point the four cells around it, each a function of its own:
real Gaussian atoms (low-pass) and complex Gabor atoms (band-pass), blended by area. After WIRE (arXiv 2301.05187) and
the algebra of complex wavelets (Roddenberry et al., arXiv 2310.00545), which fit one image each. What is notable here:

- the split into a low-pass and a progressive part is the algebra paper's: carriers of a family lie in one quarter of
  the plane, products of them too (``x + a x²``), so high frequencies never make low ones;
- in place of an initialisation at the image's singularities the cells say where their atoms stand;
- an output coarser than the tokenizer's own pixels is drawn finer and averaged. Damping every atom by a Gaussian as
  wide as its pixel costs less, but the squares escape it;
- complex numbers are pairs of real ones, which bfloat16 and compilers understand;
- features and pixels come detached: no gradient of it reaches the tokens (clipping the gradients takes all together).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from data.layout import Tokens
from stages.contract import PrefixUnsupported, Tokenizer
from stages.spectral.patches import from_patches
from stages.tokenizer.parts import HeadConfig, WaveletHeadConfig

NO_HEAD = "this tokenizer decodes at its own size only; train one with tokenizer.head.kind=wavelet"
"""What to say where another size is asked of a tokenizer without a head."""
LARGEST_SIDE = 16384
"""Longest side that is rendered."""
TILE_POINTS = 1 << 16
"""Points of all images that are worked on at once: bounds the memory, about 5 kB a point."""
DIRECTIONS = 4
"""Carriers of one ring in one family: every 22.5 degrees of a quarter of the plane."""
SHARPNESS = 1 / 4
"""Standard deviation of an atom's spectrum over its frequency."""


class Head(nn.Module, ABC):
    """A decoder for any resolution beside the tokenizer's own."""

    @abstractmethod
    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Images [B, C, height, width] of ``size`` (height, width), or their part ``crop`` (top, left, height, width).

        ``places`` [B, N, width_in] in raster order, ``pixels`` [B, C, H, W] as the tokenizer decodes them. Raises
        ValueError for a size or crop that is none, where there is nothing to render with, and PrefixUnsupported where
        features are missing.
        """

    @abstractmethod
    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        """Loss terms, scalars by name; ``large`` [B, C, H, W] are the images, as large as they are known."""


class NoHead(Head):
    """The own resolution only."""

    def __init__(self, config: HeadConfig, width_in: int, patch: int, grid: tuple[int, int], channels: int) -> None:
        super().__init__()

    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        raise InputError(NO_HEAD)

    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        return {}


class HeadedTokenizer(Tokenizer):
    """A learned tokenizer whose decoder says, beside the image, what it knows of each place: what a head renders."""

    head: Head

    @abstractmethod
    def decode_places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(the image as ``decode`` gives it, features [B, N, width] of its places in raster order)."""

    def decode(self, tokens: Tokens) -> Tensor:
        return self.decode_places(tokens)[0]

    @property
    def renders(self) -> bool:
        return not isinstance(self.head, NoHead)

    def render(self, tokens: Tokens, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> Tensor:
        pixels, places = self.decode_places(tokens)
        return self.head.render(places, pixels, size, crop).clamp(-1, 1)


class WaveletHead(Head):
    """Pixels at any resolution. Raises ValueError for cells that do not divide the patches.

    ``width_in`` are the features of a place, ``patch`` its side in pixels, ``grid`` the rows and columns of places.
    """

    carriers: Tensor

    def __init__(
        self, config: WaveletHeadConfig, width_in: int, patch: int, grid: tuple[int, int], channels: int
    ) -> None:
        super().__init__()
        if config.cell < 1 or patch % config.cell:
            raise InputError(f"tokenizer.head.cell={config.cell}; allowed: a divisor of the patches' side, {patch}")
        for key in ("width", "low_atoms", "rings", "hidden", "crop"):
            if getattr(config, key) < 1:
                raise InputError(f"tokenizer.head.{key}={getattr(config, key)}; allowed: 1 or more")
        self.config, self.grid, self.channels, self.width_in = config, grid, channels, width_in
        self.cells_of_place = patch // config.cell
        self.cells = (grid[0] * self.cells_of_place, grid[1] * self.cells_of_place)
        self.size = (grid[0] * patch, grid[1] * patch)
        width = config.width
        # cells are many and features wide: without the narrow middle this would be most of the head
        self.expand = nn.Sequential(nn.Linear(width_in, width), nn.Linear(width, width * self.cells_of_place**2))
        self.look = nn.Conv2d(channels * config.cell**2, width, 3, padding=1, padding_mode="replicate")
        self.mix = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"), nn.GELU())
        self.low = nn.Conv2d(width, channels * config.low_atoms**2, 1)
        # two families: carriers around the vertical and around the horizontal axis
        self.register_buffer("carriers", carriers(config.rings, config.cell), persistent=False)
        atoms = self.carriers.shape[1]
        self.place = nn.Conv2d(width, 2 * 2 * atoms, 1)
        self.strength = nn.Conv2d(width, 2 * 2 * atoms, 1)
        self.mixing = nn.Parameter(torch.randn(2, 2, config.hidden, atoms) / math.sqrt(2 * atoms))
        self.square = nn.Parameter(torch.full((2, config.hidden), 0.1))
        self.out = nn.Parameter(torch.randn(2, 2, channels, config.hidden) * 0.1 / math.sqrt(2 * config.hidden))

    def surroundings(self, places: Tensor, pixels: Tensor) -> Tensor:
        """What is known of each cell, with one more around the edge: [B, parameters, rows + 2, columns + 2].

        Arguments as in ``render``.
        """
        expanded = from_patches(self.expand(places), self.cells_of_place, self.grid)
        features = expanded + self.look(functional.pixel_unshuffle(pixels, self.config.cell))
        features = features + self.mix(features)
        found = torch.cat([self.low(features), torch.tanh(self.place(features)), self.strength(features)], dim=1)
        return functional.pad(found.float(), (1, 1, 1, 1), mode="replicate")

    def points(self, found: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values [B, C, h, w] at the points ``rows`` [h] and ``columns`` [w], in cells from the upper left corner.

        ``found`` is from ``surroundings``.
        """
        total = found.new_zeros(len(found), self.channels, len(rows), len(columns))
        first = [(places - 0.5).floor().long() for places in (rows, columns)]
        for down in (0, 1):
            for right in (0, 1):
                at = first[0] + down, first[1] + right
                y, x = rows - (at[0] + 0.5), columns - (at[1] + 0.5)
                weight = (1 - y.abs())[:, None] * (1 - x.abs())
                cell = found[:, :, at[0] + 1][:, :, :, at[1] + 1]
                total += weight * self.around(cell, y[:, None].expand_as(weight), x.expand_as(weight))
        return total

    def around(self, cell: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Values [B, C, h, w] of cells' functions ``cell`` [B, parameters, h, w] at ``y``, ``x`` [h, w] from them."""
        side, atoms = self.config.low_atoms, self.carriers.shape[1]
        low, place, strength = cell.split([self.channels * side**2, 4 * atoms, 4 * atoms], dim=1)
        shape = (len(cell), 2, 2, atoms, *y.shape)
        return self.low_pass(low, y, x) + self.band_pass(place.view(shape), strength.view(shape), y, x)

    def low_pass(self, strength: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Gaussians on a square of places around a cell: ``strength`` [B, C · atoms, h, w] → [B, C, h, w]."""
        side = self.config.low_atoms
        centres = (torch.arange(side, device=y.device) + 0.5) * 2 / side - 1
        narrow = side / 2  # neighbours meet at exp(-1/4) of their height

        bumps = [(-((offset[None] - centres[:, None, None]) ** 2) * narrow**2).exp() for offset in (y, x)]
        atoms = (bumps[0][:, None] * bumps[1][None]).flatten(0, 1)
        return (strength.unflatten(1, (self.channels, side**2)) * atoms).sum(2)

    def band_pass(self, place: Tensor, strength: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Gabor atoms, a complex mixture of them and of its squares: [B, C, h, w].

        ``place`` and ``strength`` [B, 2 families, 2, atoms, h, w]: where each stands, and its complex amplitude.
        """
        waves = self.carriers[..., 0, None, None] * y + self.carriers[..., 1, None, None] * x
        length = self.carriers.norm(dim=-1)[..., None, None]
        spread = (length * SHARPNESS) ** 2 / 2
        distance = (y - place[:, :, 0]) ** 2 + (x - place[:, :, 1]) ** 2
        envelope = (-spread * distance).exp()
        real, imaginary = waves.cos(), waves.sin()
        a, b = strength[:, :, 0] * envelope, strength[:, :, 1] * envelope
        atoms = torch.stack([a * real - b * imaginary, a * imaginary + b * real], dim=2)
        mixed = complex_mixture(self.mixing, atoms)
        square = self.square[:, :, None, None]
        p, q = mixed[:, :, 0], mixed[:, :, 1]
        # x + a x²: products of one-sided spectra stay on their side
        mixed = torch.stack([p + square * (p * p - q * q), q + square * 2 * p * q], dim=2)
        return complex_mixture(self.out, mixed)[:, :, 0].sum(1)

    @torch.no_grad()
    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        crop = checked_crop(size, crop)
        if places.shape[-1] != self.width_in:
            raise PrefixUnsupported("another size needs all scales of these tokens")
        found = self.surroundings(places, pixels)
        made = found.new_empty(len(found), self.channels, *crop[2:])
        budget = max(1, TILE_POINTS // (len(found) * math.prod(self.finer(size))))
        across = min(crop[3], budget)
        step = budget // across
        for top in range(0, crop[2], step):
            for left in range(0, crop[3], across):
                height, width = min(step, crop[2] - top), min(across, crop[3] - left)
                tile = (crop[0] + top, crop[1] + left, height, width)
                made[:, :, top : top + height, left : left + width] = self.tile(found, size, tile)
        return made

    def tile(self, found: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]) -> Tensor:
        """The part ``crop`` (top, left, height, width) of images of ``size``, in one piece."""
        finer = self.finer(size)
        points = [
            (torch.arange(first * n, (first + count) * n, device=found.device) + 0.5) * cells / (side * n)
            for first, count, n, cells, side in zip(crop[:2], crop[2:], finer, self.cells, size, strict=True)
        ]
        made = self.points(found, points[0], points[1])
        return made if finer == (1, 1) else functional.avg_pool2d(made, finer)

    def finer(self, size: tuple[int, int]) -> tuple[int, int]:
        """Points down and across in a pixel of images of ``size``: none farther apart than the tokenizer's own."""
        down, across = (math.ceil(own / side) for own, side in zip(self.size, size, strict=True))
        return down, across

    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        """The mean squared error of one random crop at one random size, from that of ``pixels`` to that of ``large``.

        What it should be is ``large`` itself, reduced.
        """
        share = float(torch.rand(()))
        size = tuple(round(own + share * (most - own)) for own, most in zip(self.size, large.shape[-2:], strict=True))
        wanted = large
        if size != tuple(large.shape[-2:]):
            wanted = functional.interpolate(large, size, mode="bicubic", antialias=True, align_corners=False)
        height, width = (min(self.config.crop, side) for side in size)
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, (height, width), strict=True))
        found = self.surroundings(places.detach(), pixels.detach().clamp(-1, 1))
        made = self.tile(found, (size[0], size[1]), (top, left, height, width))
        return {"head": functional.mse_loss(made, wanted[..., top : top + height, left : left + width].float())}


def carriers(rings: int, cell: int) -> Tensor:
    """Frequencies (down, right) of the atoms, in radians a cell: [2 families, atoms, 2].

    The finest ring has one wave in two pixels, each other one half the frequency of the one before. A family's lie
    within 34 degrees of its axis, so an atom's spectrum, a Gaussian of ``SHARPNESS`` of its frequency, lies on one side
    of the plane but for the share behind 3.3 standard deviations.
    """
    lengths = math.pi * cell / 2.0 ** torch.arange(rings)
    angles = (torch.arange(DIRECTIONS) - (DIRECTIONS - 1) / 2) * (math.pi / 2 / DIRECTIONS)
    along = torch.stack([angles.cos(), angles.sin()], dim=-1)
    first = (lengths[:, None, None] * along).flatten(0, 1)
    return torch.stack([first, first.flip(-1)])


def complex_mixture(weights: Tensor, x: Tensor) -> Tensor:
    """Complex linear maps, one a family, of pairs: [F, 2, K, T] and [B, F, 2, T, h, w] → [B, F, 2, K, h, w]."""
    real, imaginary = weights[:, 0], weights[:, 1]
    a, b = x[:, :, 0], x[:, :, 1]

    def product(matrix: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("fkt,bfthw->bfkhw", matrix, values)

    return torch.stack([product(real, a) - product(imaginary, b), product(real, b) + product(imaginary, a)], dim=2)


def checked_crop(size: tuple[int, int], crop: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
    """The crop (top, left, height, width), or all of ``size``. Raises ValueError for no size, or a part outside."""
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise InputError(f"size={size[0]}x{size[1]}; allowed: 1 to {LARGEST_SIDE} a side")
    if crop is None:
        return (0, 0, *size)
    top, left, height, width = crop
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise InputError(
            f"crop={top},{left},{height},{width} (top, left, height, width) lies outside of {size[0]}x{size[1]}"
        )
    return crop
