"""Heads: decoders for any resolution. A wavelet head renders the features of each place as a sum of wavelets.

features and decoded pixels → a map of cells → each point blends the functions of its four nearest cells by area. The
function of a cell is a sum of real Gaussian atoms (low-pass) and complex Gabor atoms (band-pass). This follows WIRE
(arXiv 2301.05187) and the algebra of complex wavelets (Roddenberry et al., arXiv 2310.00545), which fit single images.
Notes:

- The split into a low-pass and a progressive part is from the algebra paper. The carriers of a family lie in one
  quarter of the frequency plane, and so do their products (``x + a x²``), so high frequencies never create low ones.
- The paper initializes atoms at the singularities of an image. Here the cells predict the positions of their atoms.
- An output coarser than the tokenizer's pixels is rendered at a higher resolution and averaged. Damping every atom with
  a Gaussian as wide as a pixel is cheaper, but does not damp the squares.
- Complex numbers are pairs of real numbers, which work with bfloat16 and compilers.
- In training, features and pixels are detached, so no gradient reaches the tokens (gradient clipping uses one norm for
  all parameters).
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
"""Error message of tokenizers without a head for other sizes."""
LARGEST_SIDE = 16384
"""Maximum side in pixels for rendering."""
TILE_POINTS = 1 << 16
"""Points computed at once over all images. This limits the memory, about 5 kB per point."""
DIRECTIONS = 4
"""Carriers per ring and family: one every 22.5 degrees in a quarter of the plane."""
SHARPNESS = 1 / 4
"""Standard deviation of the spectrum of an atom, relative to its frequency."""


class Head(nn.Module, ABC):
    """Base class of decoders for any resolution."""

    @abstractmethod
    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Images [B, C, height, width] of ``size`` (height, width), or their part ``crop`` (top, left, height, width).

        ``places`` are features [B, N, width_in] in raster order, ``pixels`` [B, C, H, W] the decoded images. Raises
        ValueError for an invalid size or crop and for ``NoHead``, PrefixUnsupported if features are missing.
        """

    @abstractmethod
    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        """Scalar loss terms by name. ``large`` [B, C, H, W] are the images at the largest available size."""


class NoHead(Head):
    """No head: the tokenizer decodes only at its own resolution."""

    def __init__(self, config: HeadConfig, width_in: int, patch: int, grid: tuple[int, int], channels: int) -> None:
        super().__init__()

    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        raise InputError(NO_HEAD)

    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        return {}


class HeadedTokenizer(Tokenizer):
    """Base class of learned tokenizers with a head. Their decoder also returns features of each place for the head."""

    head: Head

    @abstractmethod
    def decode_places(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(image as from ``decode``, features [B, N, width] of its places in raster order)."""

    def decode(self, tokens: Tokens) -> Tensor:
        return self.decode_places(tokens)[0]

    @property
    def renders(self) -> bool:
        return not isinstance(self.head, NoHead)

    def render(self, tokens: Tokens, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> Tensor:
        pixels, places = self.decode_places(tokens)
        return self.head.render(places, pixels, size, crop).clamp(-1, 1)


class WaveletHead(Head):
    """Renders pixels at any resolution.

    ``width_in`` is the number of features of a place, ``patch`` its side in pixels, ``grid`` the rows and columns of
    places. Raises ValueError for config values below 1, and for cells that do not divide the patches.
    """

    carriers: Tensor

    def __init__(
        self, config: WaveletHeadConfig, width_in: int, patch: int, grid: tuple[int, int], channels: int
    ) -> None:
        super().__init__()
        if config.cell < 1 or patch % config.cell:
            raise InputError(f"tokenizer.head.cell={config.cell}; allowed: a divisor of the patch side, {patch}")
        for key in ("width", "low_atoms", "rings", "hidden", "crop"):
            if getattr(config, key) < 1:
                raise InputError(f"tokenizer.head.{key}={getattr(config, key)}; allowed: 1 or more")
        self.config, self.grid, self.channels, self.width_in = config, grid, channels, width_in
        self.cells_of_place = patch // config.cell
        self.cells = (grid[0] * self.cells_of_place, grid[1] * self.cells_of_place)
        self.size = (grid[0] * patch, grid[1] * patch)
        width = config.width
        # a bottleneck: with many cells and wide features, a direct layer would dominate the size of the head
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
        """Parameters of each cell, padded by one cell at each border: [B, parameters, rows + 2, columns + 2].

        The arguments are those of ``render``.
        """
        expanded = from_patches(self.expand(places), self.cells_of_place, self.grid)
        features = expanded + self.look(functional.pixel_unshuffle(pixels, self.config.cell))
        features = features + self.mix(features)
        parameters = torch.cat([self.low(features), torch.tanh(self.place(features)), self.strength(features)], dim=1)
        return functional.pad(parameters.float(), (1, 1, 1, 1), mode="replicate")

    def points(self, found: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values [B, C, h, w] at the points ``rows`` [h] and ``columns`` [w], in cells from the top left corner.

        ``found`` are the parameters from ``surroundings``.
        """
        total = found.new_zeros(len(found), self.channels, len(rows), len(columns))
        first = [(places - 0.5).floor().long() for places in (rows, columns)]
        for down in (0, 1):
            for right in (0, 1):
                cell_index = first[0] + down, first[1] + right
                y, x = rows - (cell_index[0] + 0.5), columns - (cell_index[1] + 0.5)
                weight = (1 - y.abs())[:, None] * (1 - x.abs())
                cell = found[:, :, cell_index[0] + 1][:, :, :, cell_index[1] + 1]
                total += weight * self.around(cell, y[:, None].expand_as(weight), x.expand_as(weight))
        return total

    def around(self, cell: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Values [B, C, h, w] of the functions ``cell`` [B, parameters, h, w] at offsets ``y``, ``x`` [h, w]."""
        side, atoms = self.config.low_atoms, self.carriers.shape[1]
        low, place, strength = cell.split([self.channels * side**2, 4 * atoms, 4 * atoms], dim=1)
        shape = (len(cell), 2, 2, atoms, *y.shape)
        return self.low_pass(low, y, x) + self.band_pass(place.view(shape), strength.view(shape), y, x)

    def low_pass(self, strength: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Sum of Gaussians on a square grid around a cell: ``strength`` [B, C · atoms, h, w] → [B, C, h, w]."""
        side = self.config.low_atoms
        centers = (torch.arange(side, device=y.device) + 0.5) * 2 / side - 1
        inverse_width = side / 2  # neighbors meet at exp(-1/4) of their height

        bumps = [(-((offset[None] - centers[:, None, None]) ** 2) * inverse_width**2).exp() for offset in (y, x)]
        atoms = (bumps[0][:, None] * bumps[1][None]).flatten(0, 1)
        return (strength.unflatten(1, (self.channels, side**2)) * atoms).sum(2)

    def band_pass(self, place: Tensor, strength: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Gabor atoms, mixed by a complex linear map, with squares added: [B, C, h, w].

        ``place`` and ``strength`` [B, 2 families, 2, atoms, h, w] are the position and the complex amplitude of each
        atom.
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
        # x + a x²: products of one-sided spectra stay one-sided
        mixed = torch.stack([p + square * (p * p - q * q), q + square * 2 * p * q], dim=2)
        return complex_mixture(self.out, mixed)[:, :, 0].sum(1)

    @torch.no_grad()
    def render(
        self, places: Tensor, pixels: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        crop = checked_crop(size, crop)
        if places.shape[-1] != self.width_in:
            raise PrefixUnsupported("another size needs all scales of these tokens")
        parameters = self.surroundings(places, pixels)
        images = parameters.new_empty(len(parameters), self.channels, *crop[2:])
        budget = max(1, TILE_POINTS // (len(parameters) * math.prod(self.finer(size))))
        tile_width = min(crop[3], budget)
        tile_height = budget // tile_width
        for top in range(0, crop[2], tile_height):
            for left in range(0, crop[3], tile_width):
                height, width = min(tile_height, crop[2] - top), min(tile_width, crop[3] - left)
                tile = (crop[0] + top, crop[1] + left, height, width)
                images[:, :, top : top + height, left : left + width] = self.tile(parameters, size, tile)
        return images

    def tile(self, found: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]) -> Tensor:
        """Render the part ``crop`` (top, left, height, width) of images of ``size``, without tiling."""
        finer = self.finer(size)
        points = [
            (torch.arange(first * n, (first + count) * n, device=found.device) + 0.5) * cells / (side * n)
            for first, count, n, cells, side in zip(crop[:2], crop[2:], finer, self.cells, size, strict=True)
        ]
        values = self.points(found, points[0], points[1])
        return values if finer == (1, 1) else functional.avg_pool2d(values, finer)

    def finer(self, size: tuple[int, int]) -> tuple[int, int]:
        """Points (vertical, horizontal) per pixel of images of ``size``, at least as dense as the pixels of the
        tokenizer."""
        vertical, horizontal = (math.ceil(own / side) for own, side in zip(self.size, size, strict=True))
        return vertical, horizontal

    def losses(self, places: Tensor, pixels: Tensor, large: Tensor) -> dict[str, Tensor]:
        """Mean squared error of a random crop at a random size between those of ``pixels`` and ``large``.

        The target is ``large``, downsampled to that size.
        """
        share = float(torch.rand(()))
        size = tuple(
            round(own + share * (largest - own)) for own, largest in zip(self.size, large.shape[-2:], strict=True)
        )
        target = large
        if size != tuple(large.shape[-2:]):
            target = functional.interpolate(large, size, mode="bicubic", antialias=True, align_corners=False)
        height, width = (min(self.config.crop, side) for side in size)
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, (height, width), strict=True))
        parameters = self.surroundings(places.detach(), pixels.detach().clamp(-1, 1))
        rendered = self.tile(parameters, (size[0], size[1]), (top, left, height, width))
        return {"head": functional.mse_loss(rendered, target[..., top : top + height, left : left + width].float())}


def carriers(rings: int, cell: int) -> Tensor:
    """Frequencies (vertical, horizontal) of the atoms, in radians per cell: [2 families, atoms, 2].

    The finest ring has a wavelength of two pixels, and every next ring half the frequency. Directions of a family are
    within 34 degrees of its axis. The spectrum of an atom is a Gaussian with ``SHARPNESS`` times its frequency as the
    standard deviation, so it lies in one half of the plane up to 3.3 standard deviations.
    """
    lengths = math.pi * cell / 2.0 ** torch.arange(rings)
    angles = (torch.arange(DIRECTIONS) - (DIRECTIONS - 1) / 2) * (math.pi / 2 / DIRECTIONS)
    along = torch.stack([angles.cos(), angles.sin()], dim=-1)
    first = (lengths[:, None, None] * along).flatten(0, 1)
    return torch.stack([first, first.flip(-1)])


def complex_mixture(weights: Tensor, x: Tensor) -> Tensor:
    """One complex linear map per family, [F, 2, K, T] applied to [B, F, 2, T, h, w] → [B, F, 2, K, h, w]."""
    real, imaginary = weights[:, 0], weights[:, 1]
    a, b = x[:, :, 0], x[:, :, 1]

    def product(matrix: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("fkt,bfthw->bfkhw", matrix, values)

    return torch.stack([product(real, a) - product(imaginary, b), product(real, b) + product(imaginary, a)], dim=2)


def checked_crop(size: tuple[int, int], crop: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
    """The crop (top, left, height, width); all of ``size`` for None. Raises ValueError for an invalid size or crop."""
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise InputError(f"size={size[0]}x{size[1]}; allowed: 1 to {LARGEST_SIDE} per side")
    if crop is None:
        return (0, 0, *size)
    top, left, height, width = crop
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise InputError(
            f"crop={top},{left},{height},{width} (top, left, height, width) lies outside of {size[0]}x{size[1]}"
        )
    return crop
