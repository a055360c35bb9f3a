"""Sparse lists of quantized DCT coefficients as tokens: JPEG without its entropy coding.

After *Generating Images with Sparse Representations* (Nash et al., arXiv 2103.03841) and ITU-T T.81. Notes:

- Everything before the list is JPEG: 8-bit YCbCr, chroma at half width and height, quantization tables by quality.
  Decoding is JPEG too, with 8-bit samples and libjpeg's filters.
- The paper's figure shows four frequency bands without their borders. Here bands are the octaves of the block, so the
  bands up to the k-th are the DCT of the image downsampled by block / 2^k: a prefix of bands is a smaller image.
- The order in a band is: channels of luma, then those of the two chroma planes, in zigzag order, then by position.
- Values outside the range measured in training images are clipped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.layout import Field, Scale, TokenLayout, Tokens
from stages.codecs.config import SparseDCTConfig
from stages.contract import RefusedImage, Tokenizer
from stages.doubles import doubled, doubles_at
from stages.lists import ListGrammar
from stages.scales import keep_scales
from stages.spectral.colour import to_rgb, to_ycbcr
from stages.spectral.dct import block_dct, block_idct, frequencies_by_shell, pad_to_multiple, shell
from stages.spectral.jpeg import double, halve, quantization_table

BLOCKS = (2, 4, 8, 16)
SUBSAMPLINGS = ("4:2:0", "4:4:4")
UPSAMPLINGS = ("triangle", "nearest")
OVERFLOWS = ("refuse", "lower")


class Channel(NamedTuple):
    """One frequency of one plane. Channels sorted by these fields are in list order."""

    octave: int
    chroma: bool
    plane: int
    rank: int
    """Index of the frequency among those of a plane."""
    frequency: int
    """u · block + v"""


class SparseDCTCodec(Tokenizer):
    """Codec for gray or RGB images of any size. Sides are padded to whole blocks and cropped after decoding.

    Raises ValueError for a quality outside 1 to 100 and for other config values that are not allowed.
    """

    def __init__(self, config: SparseDCTConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.config, self.channels, self.image_size = config, channels, image_size
        for name, value, allowed in (
            ("block", config.block, BLOCKS),
            ("chroma", config.chroma, SUBSAMPLINGS),
            ("chroma_upsampling", config.chroma_upsampling, UPSAMPLINGS),
            ("overflow", config.overflow, OVERFLOWS),
        ):
            if value not in allowed:
                raise InputError(f"tokenizer.{name}={value!r}; allowed: {', '.join(map(str, allowed))}")
        if not 1 <= config.quality <= 100:
            raise InputError(f"tokenizer.quality={config.quality}; allowed: 1 to 100")
        for name in ("largest_value", "max_length"):
            if getattr(config, name) < 0:
                raise InputError(f"tokenizer.{name}={getattr(config, name)}; allowed: 0 or more")
        if channels not in (1, 3) or min(image_size) < 1:
            raise InputError(f"images of {image_size} with {channels} channels; allowed: 1 or 3 channels")
        self.halved = channels == 3 and config.chroma == "4:2:0"
        multiple = config.block * (2 if self.halved else 1)
        padded = [side + -side % multiple for side in image_size]
        grid = (padded[0] // config.block, padded[1] // config.block)
        chroma = (grid[0] // 2, grid[1] // 2) if self.halved else grid
        self.grids = (grid, *[chroma] * (channels - 1))
        self.block_sides = {
            (height * side // config.block, width * side // config.block): side
            for side in (2**octave for octave in range(config.block.bit_length()))
            for height, width in [image_size]
            if not (height * side % config.block or width * side % config.block)
        } | {image_size: config.block}
        """Image sizes that can be encoded, each with the side of its blocks."""
        self.channel_table = sorted(
            Channel(shell(frequency, config.block), plane > 0, plane, rank, frequency)
            for plane in range(channels)
            for rank, frequency in enumerate(frequencies_by_shell(config.block))
        )
        # maximum number of times that quality is halved, down to 1
        self.lowerings = config.quality.bit_length() - 1 if config.overflow == "lower" else 0
        self._starts = np.ones(self.lowerings + 1)
        self._set_range(config.largest_value)

    def _set_range(self, largest: int) -> None:
        """Build the layout for values up to ``largest``; 0 for the largest possible value."""
        config = self.config
        # samples are in -128 … 127, and the transform preserves the norm of a block
        self.largest = largest or int(128 * config.block / float(self.tables(0).min())) + 1
        groups = list(dict.fromkeys((channel.octave, channel.chroma) for channel in self.channel_table))
        scale_of = [groups.index((channel.octave, channel.chroma)) for channel in self.channel_table]
        planes = [channel.plane for channel in self.channel_table]
        grammar: dict[str, Any] = {
            "planes": planes,
            "scales": scale_of,
            "grids": [list(grid) for grid in self.grids],
            "largest": self.largest,
        }
        self.grammar = ListGrammar(**grammar)
        sizes = self.grammar.size_of.tolist()
        fields = (
            Field("channel", self.grammar.end + 1),
            Field("position", self.grammar.num_positions),
            Field("value", 2 * self.largest + 1),
        )
        lengths = torch.bincount(torch.tensor(scale_of), self.grammar.size_of[: len(scale_of)]).long().tolist()
        lengths[-1] += 1  # the end element
        scales = []
        for (octave, chroma), length in zip(groups, lengths, strict=True):
            side = 2**octave
            rung = next((size for size, block in self.block_sides.items() if block == side), None)
            if self.channels == 3 and not chroma:
                rung = None  # luma alone is not an RGB image
            name = f"{side}x{side}" + ("" if self.channels == 1 else " chroma" if chroma else " luma")
            content = "all" if self.channels == 1 else "chroma" if chroma else "luma"
            scales.append(Scale(name, length, None, 0, fields, self.image_size, content, rung))
        self.full_length = sum(lengths)
        self.layout = TokenLayout(
            tuple(scales),
            header=(Field("lowered", self.lowerings + 1),) if self.lowerings else (),
            max_length=min(config.max_length or self.full_length, self.full_length),
            ends="grammar",
            grammar={"kind": "list", **grammar},
            decodes_prefixes=True,
        )
        # channel, first index and position of every coefficient in list order
        starts = np.cumsum([0, *sizes[: self.grammar.end]])
        flat = torch.arange(int(starts[-1]))
        self.channel_of = torch.from_numpy(np.repeat(np.arange(self.grammar.end), sizes[: self.grammar.end]))
        self.first_of = torch.from_numpy(starts[:-1].copy())
        self.position_of = flat - self.first_of[self.channel_of]

    def tables(self, lowered: int) -> Tensor:
        """Quantization steps float64 [channels of all planes], in the order of channels, at quality / 2^lowered."""
        quality, block = max(1, self.config.quality >> lowered), self.config.block
        steps = [quantization_table(quality, chroma, block) for chroma in (False, True)]
        return torch.stack([steps[channel.chroma][channel.frequency] for channel in self.channel_table])

    # ------------------------------------------------------------------ pixels and coefficients

    def to_planes(self, pixels: Tensor, block: int) -> list[Tensor]:
        """8-bit samples around 0 as float64, Y [B, 1, H, W] and chroma [B, 2, h, w], from pixels in [-1, 1]."""
        multiple = block * (2 if self.halved else 1)
        rounded = torch.round(127.5 * (doubled(pixels.detach()) + 1)).clamp(0, 255)
        if self.channels == 1:
            return [pad_to_multiple(rounded - 128, multiple)]
        ycbcr = torch.from_numpy(to_ycbcr(rounded.cpu().numpy())).to(rounded.device)
        luma = (_nearest(ycbcr[:, :1]) - 128).clamp(-128, 127)
        chroma = pad_to_multiple((-_nearest(-ycbcr[:, 1:])).clamp(-128, 127), multiple)
        return [pad_to_multiple(luma, multiple), halve(chroma) if self.halved else chroma]

    def to_coefficients(self, pixels: Tensor) -> Tensor:
        """Coefficients float64 [B, n] in list order, not quantized, from pixels in [-1, 1].

        A rung at b / block of the full size is divided into blocks of side b. Their coefficients, times block / b, are
        the low frequencies of the full image. Raises ValueError for other sizes or another number of channels.
        """
        block = self._block_of(pixels)
        scale = self.config.block / block
        parts = [block_dct(plane, block).flatten(-2) * scale for plane in self.to_planes(pixels, block)]
        by_plane = [part[:, index] for part in parts for index in range(part.shape[1])]
        coefficients = []
        for channel in self.channel_table:
            u, v = divmod(channel.frequency, self.config.block)
            plane = by_plane[channel.plane]
            coefficients.append(plane[:, u * block + v] if max(u, v) < block else torch.zeros_like(plane[:, 0]))
        return torch.cat(coefficients, dim=1)

    def _block_of(self, pixels: Tensor) -> int:
        """Side of the blocks for images of this size. Raises ValueError for an unsupported shape."""
        if pixels.shape[1] == self.channels:
            for size, block in self.block_sides.items():
                if tuple(pixels.shape[2:]) == size:
                    return block
        sizes = ", ".join(f"{height}x{width}" for height, width in self.block_sides)
        raise InputError(f"images {tuple(pixels.shape[1:])}; allowed: {self.channels} channels of {sizes}")

    def to_pixels(self, coefficients: Tensor) -> Tensor:
        """Pixels float32 [B, C, H, W] in [-1, 1] from coefficients [B, n] in list order."""
        count = len(coefficients)
        planes = [coefficients.new_zeros(count, self.config.block**2, *grid) for grid in self.grids]
        for number, channel in enumerate(self.channel_table):
            start, size = int(self.first_of[number]), int(self.grammar.size_of[number])
            grid = coefficients[:, start : start + size].view(count, *self.grids[channel.plane])
            planes[channel.plane][:, channel.frequency] = grid
        samples = [_nearest(block_idct(plane, self.config.block)).clamp(-128, 127).unsqueeze(1) for plane in planes]
        height, width = self.image_size
        if self.channels == 1:
            image = samples[0] + 128
        else:
            chroma = torch.cat(samples[1:], dim=1)
            if self.halved:
                chroma = _nearest(double(chroma, self.config.chroma_upsampling == "triangle"))
            ycbcr = torch.cat([samples[0] + 128, chroma], dim=1)
            image = _nearest(torch.from_numpy(to_rgb(ycbcr.cpu().numpy())).to(coefficients.device))
        return (image[..., :height, :width] / 127.5 - 1).clamp(-1, 1).float()

    # ------------------------------------------------------------------ tokens

    def encode(self, pixels: Tensor) -> Tokens:
        quantized, lowered = self.quantise(self.to_coefficients(pixels))
        clipped = quantized.clamp(-self.largest, self.largest)
        tokens = self.to_list(clipped, lowered)
        tokens.remarks = {"values_clipped": (clipped != quantized).sum(1).cpu()}
        if self.lowerings:
            tokens.remarks["images_of_lower_quality"] = (lowered > 0).long().cpu()
        block = self._block_of(pixels)
        if block < self.config.block:
            octaves = block.bit_length()
            kept = octaves * len(self.layout.scales) // self.config.block.bit_length()
            tokens = replace(self.first_scales(tokens, kept), remarks=tokens.remarks)
        return tokens.to(pixels.device)

    def quantise(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """(quantized coefficients int64 [B, n], number of times that the quality of each image was halved [B]).

        Raises RefusedImage if the list of an image is longer than ``max_length`` at every allowed quality.
        """
        lowered = torch.zeros(len(coefficients), dtype=torch.int64, device=coefficients.device)
        quantized = torch.zeros(coefficients.shape, dtype=torch.int64, device=coefficients.device)
        rows = torch.arange(len(coefficients), device=coefficients.device)
        for step in range(self.lowerings + 1):
            quantized[rows] = _quantize(coefficients[rows] / self._steps(step).to(coefficients.device))
            lowered[rows] = step
            lengths = 1 + (quantized != 0).sum(1)
            rows = (lengths > self.layout.length).nonzero()[:, 0]
            if not len(rows):
                return quantized, lowered
        row = int(rows[0])
        quality = max(1, self.config.quality >> self.lowerings)
        remedy = "" if self.lowerings else ", or set tokenizer.overflow=lower"
        raise RefusedImage(
            row,
            f"a list of {int(lengths[row])} elements at quality {quality}, but tokenizer.max_length="
            f"{self.config.max_length}; raise it, lower tokenizer.quality{remedy}",
        )

    def _steps(self, lowered: int) -> Tensor:
        """Quantization step of every coefficient in list order: float64 [n]."""
        return self.tables(lowered)[self.channel_of]

    def to_list(self, values: Tensor, lowered: Tensor) -> Tokens:
        """Lists of quantized coefficients int64 [B, n]. ``lowered`` [B] is the number of halvings of quality."""
        rows, places = values.nonzero(as_tuple=True)  # sorted by row, then in list order
        counts = torch.bincount(rows, minlength=len(values))
        ids = values.new_zeros(len(values), 1 + int(counts.max() if len(values) else 0), 3)
        ranks = torch.arange(len(rows), device=values.device) - (counts.cumsum(0) - counts)[rows]
        indices = places.to(self.channel_of.device)
        channel, position = self.channel_of[indices].to(rows.device), self.position_of[indices].to(rows.device)
        ids[rows, ranks] = torch.stack([channel, position, values[rows, places] + self.largest], dim=1)
        ids[torch.arange(len(values)), counts] = values.new_tensor([self.grammar.end, 0, self.largest])
        header = lowered[:, None] if self.lowerings else values.new_zeros(len(values), 0)
        return Tokens(ids, counts + 1, header)

    def to_values(self, tokens: Tokens) -> Tensor:
        """Quantized coefficients int64 [B, n] of lists or prefixes of them.

        Raises ValueError, which names the first element that breaks the order, repeats a place or is out of range.
        """
        ids, counted = tokens.ids, tokens.counted
        if len(tokens) and not 0 <= int(tokens.lengths.min()) <= int(tokens.lengths.max()) <= ids.shape[1]:
            raise InputError(f"lengths {tokens.lengths.tolist()} of lists with {ids.shape[1]} elements")
        self.grammar.annotate(tokens)
        is_value = counted & (ids[..., 0] != self.grammar.end)
        values = ids.new_zeros(len(ids), len(self.channel_of))
        channel, position, value = ids[is_value].unbind(-1)
        places = self.first_of.to(ids.device)[channel] + position
        values[is_value.nonzero()[:, 0], places] = value - self.largest
        return values

    def decode(self, tokens: Tokens) -> Tensor:
        device = tokens.ids.device
        tokens = tokens.to(doubles_at(device))
        values, lowered = self.to_values(tokens).double(), self._lowered(tokens)
        for step in lowered.unique().tolist():
            values[lowered == step] *= self._steps(step).to(values.device)
        return self.to_pixels(values).to(device)

    def _lowered(self, tokens: Tokens) -> Tensor:
        """Number of halvings of the quality of each list: int64 [B]. Raises ValueError for an invalid header."""
        if not self.lowerings:
            return tokens.lengths.new_zeros(len(tokens))
        lowered = tokens.header[:, 0]
        if len(lowered) and not 0 <= int(lowered.min()) <= int(lowered.max()) <= self.lowerings:
            raise InputError(f"a header of {lowered.tolist()}; allowed: 0 to {self.lowerings} halvings of the quality")
        return lowered

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        kept = self.grammar.scale_of[self.channel_of] < num_scales
        coefficients = self.to_coefficients(pixels)
        return self.to_pixels(coefficients * kept.to(coefficients.device)).to(pixels.device)

    def first_scales(self, tokens: Tokens, num_scales: int) -> Tokens:
        return keep_scales(tokens, self.layout, range(num_scales), self.grammar)

    # ------------------------------------------------------------------ statistics

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the range of values and the distribution of quality halvings. Raises ValueError without images."""
        largest, lowered = 0, [torch.zeros(0, dtype=torch.int64)]
        for pixels, _ in batches:
            values, steps = self.quantise(self.to_coefficients(pixels))
            largest = max(largest, int(values.abs().max()))
            lowered.append(steps.cpu())
        if len(lowered) == 1:
            raise InputError("there is no image whose values could be measured (tokenizer_training.fit_images)")
        self._starts = np.bincount(torch.cat(lowered).numpy(), minlength=self.lowerings + 1).astype(float)
        self._set_range(self.config.largest_value or max(1, largest))

    def statistics(self) -> dict[str, Any]:
        return {"largest": self.largest, "lowered": self._starts.tolist()}

    def restore(self, statistics: dict[str, Any]) -> None:
        self._starts = np.array(statistics["lowered"], np.float64)
        self._set_range(int(statistics["largest"]))

    def start_prefix(self, labels: Tensor, seeds: Sequence[int]) -> Tokens | None:
        """A header drawn from the measured distribution; None for layouts without header."""
        if not self.lowerings:
            return None
        shares = self._starts / self._starts.sum()
        drawn = [np.random.default_rng([seed % 2**64, 1]).choice(len(shares), p=shares) for seed in seeds]
        empty = torch.zeros(len(seeds), 0, 3, dtype=torch.int64)
        return Tokens(empty, torch.zeros(len(seeds), dtype=torch.int64), torch.tensor(drawn)[:, None])

    def header_bits(self, tokens: Tokens, labels: Tensor) -> Tensor:
        if not self.lowerings:
            return super().header_bits(tokens, labels)
        smooth = torch.from_numpy(self._starts + 0.5)  # so that unseen headers can be encoded too
        return -(smooth / smooth.sum()).log2()[self._lowered(tokens).cpu()]


def _nearest(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves up as in libjpeg's fixed-point code. Halves are common and shift flat areas.

    In float64 a half may have rounding errors in the last bits, so a small number is added.
    """
    return (x + 0.5 + 1e-9).floor()


def _quantize(x: Tensor) -> Tensor:
    """Round to the nearest integer as int64, halves away from zero as in JPEG encoders."""
    return (x.sign() * _nearest(x.abs())).long()
