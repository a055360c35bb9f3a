"""Bit-planes of wavelet coefficients as tokens: a tokenizer that needs no training.

After *Wavelets Are All You Need for Autoregressive Image Generation* (Mattar et al., arXiv 2406.19997). Notes:

- Each plane encodes for every coefficient whether it reaches the threshold T, its sign when it first does, and in later
  planes which half of its interval it is in. Then T is halved. Every prefix of a stream can be decoded.
- The error of a significant coefficient is at most half of the final threshold; that of an insignificant one is less
  than the final threshold. According to the paper's text, coefficients are also refined in the plane in which they
  become significant. The printed example and lengths in the paper do not do this, and neither does this code.
- Color is encoded as Y, Cb and Cr, alternating block by block, so every prefix is an image in color.
- All computations are exact: 8-bit integers, then float64 and halves of powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.layout import Field, Scale, TokenLayout, Tokens
from stages.codecs import kernels
from stages.codecs.config import BitplaneConfig
from stages.codecs.grammar import NAMES, BitplaneGrammar, Variant
from stages.contract import Tokenizer
from stages.scales import keep_scales
from stages.spectral.colour import to_rgb, to_ycbcr
from stages.spectral.nested import largest_coefficient, levels_of, nested_dwt, nested_idwt

SCALING = 4
"""Number of scaling coefficients of a color plane."""
WAVELETS = ("haar", "bior4.4")


class BitplaneCodec(Tokenizer):
    """Codec for square gray or RGB images with a power of two as the side.

    Raises ValueError for another side, number of channels, wavelet or variant, and for thresholds that are not powers
    of two in the allowed range.
    """

    def __init__(self, config: BitplaneConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        side = image_size[0]
        if image_size[0] != image_size[1] or channels not in (1, 3):
            raise InputError(f"images of {image_size} with {channels} channels; allowed: squares with 1 or 3 channels")
        try:
            levels_of(side)
        except ValueError as error:
            raise InputError(f"images.size: {error} (images.eval_view=pad frames smaller ones)") from error
        for name, value, allowed in (
            ("wavelet", config.wavelet, WAVELETS),
            ("variant", config.variant, tuple(NAMES)),
        ):
            if value not in allowed:
                raise InputError(f"tokenizer.{name}={value!r}; allowed: {', '.join(allowed)}")
        final, start = config.final_threshold, config.start_threshold
        largest = largest_coefficient(side, config.wavelet) * (1 - 1e-9)
        largest_threshold = 2.0 ** (math.ceil(math.log2(largest)) - 1)
        for name, threshold in (("final_threshold", final), ("start_threshold", start or final)):
            if math.frexp(threshold)[0] != 0.5 or not 2**-20 <= threshold <= largest_threshold:
                raise InputError(
                    f"tokenizer.{name}={threshold}; allowed: powers of two from 2^-20 to {largest_threshold:g}"
                )
        if start and start < final:
            raise InputError(f"tokenizer.start_threshold={start}; allowed: tokenizer.final_threshold={final} or more")
        self.planes = 1 + round(math.log2((start or largest_threshold) / final))
        variant: Variant = "zerotree" if config.variant == "zerotree" else "blocks"
        grammar = {"side": side, "channels": channels, "planes": self.planes, "final": final, "variant": variant}
        self.grammar = BitplaneGrammar(side, channels, self.planes, final, variant)
        self.scan = self.grammar.scan
        size = len(self.scan.order)
        token = (Field("token", len(self.grammar.names)),)
        self.layout = TokenLayout(
            tuple(
                Scale(f"T={final * 2.0 ** (self.planes - 1 - plane):g}", size, None, 0, token, image_size)
                for plane in range(self.planes)
            ),
            header=(Field("planes", self.planes + 1),),
            max_length=self.planes * size,
            ends="grammar",
            grammar={"kind": "bitplane", **grammar},
            decodes_prefixes=True,
        )
        self._starts = _Starts.of_nothing(self.planes, channels)

    # ------------------------------------------------------------------ pixels and coefficients

    def to_coefficients(self, pixels: Tensor) -> np.ndarray:
        """Coefficients float64 [B, n] in scan order from pixels in [-1, 1]. Raises ValueError for another size."""
        expected = (self.channels, *self.layout.image_size)
        if pixels.shape[1:] != expected:
            raise InputError(f"images {tuple(pixels.shape[1:])}; allowed: {expected}")
        rounded = np.round(127.5 * (pixels.detach().cpu().double().numpy() + 1)).clip(0, 255) / 255
        matrix = nested_dwt(to_ycbcr(rounded) if self.channels == 3 else rounded, self.config.wavelet)
        return np.ascontiguousarray(matrix.reshape(len(matrix), -1)[:, self.scan.order])

    def to_pixels(self, values: np.ndarray) -> Tensor:
        """Pixels float32, clamped to [-1, 1], from coefficients [B, n] in scan order."""
        matrix = np.empty_like(values)
        matrix[:, self.scan.order] = values
        planes = nested_idwt(matrix.reshape(len(values), self.channels, *self.layout.image_size), self.config.wavelet)
        pixels = to_rgb(planes) if self.channels == 3 else planes
        return torch.from_numpy((2 * pixels - 1).clip(-1, 1)).float()

    # ------------------------------------------------------------------ tokens

    def encode(self, pixels: Tensor) -> Tokens:
        values = self.to_coefficients(pixels)
        return self.encode_coefficients(values, self.planes_of(values)).to(pixels.device)

    def planes_of(self, values: np.ndarray) -> np.ndarray:
        """Numbers of planes int64 [B] for coefficients [B, n]. Raises ValueError if ``start_threshold`` is too low."""
        largest = np.abs(values).max(axis=1, initial=0)
        if self.config.start_threshold:
            too_large = np.flatnonzero(largest > 2 * self.config.start_threshold)
            if len(too_large):
                minimum = 2.0 ** (math.ceil(math.log2(largest[too_large[0]])) - 1)
                raise InputError(
                    f"image {too_large[0]} of the batch has a coefficient of {largest[too_large[0]]:g}: "
                    f"tokenizer.start_threshold={self.config.start_threshold:g} allows at most twice its value; "
                    f"use {minimum:g} or more, or 0 for each image's own"
                )
            return np.full(len(values), self.planes)
        # as in the paper: if the largest coefficient is a power of two, start one plane lower, with no larger error
        exponent = np.ceil(np.log2(np.maximum(largest, 2.0**-40))).astype(np.int64) - 1
        return np.clip(exponent - round(math.log2(self.config.final_threshold)) + 1, 0, self.planes)

    def encode_coefficients(self, values: np.ndarray, planes: np.ndarray) -> Tokens:
        """Encode coefficients float64 [B, n] with ``planes`` [B] into streams."""
        ids = np.zeros((len(values), values.shape[1] * int(planes.max(initial=0))), np.uint8)
        scan, final = self.scan, self.config.final_threshold
        lengths = kernels.encode(values, planes, final, scan.child, self.grammar.zerotree, ids)
        ids = ids[:, : lengths.max(initial=0), None].astype(np.int64)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(planes[:, None]))

    def decode(self, tokens: Tokens) -> Tensor:
        return self.to_pixels(self.decode_coefficients(tokens)).to(tokens.ids.device)

    def decode_coefficients(self, tokens: Tokens) -> np.ndarray:
        """Decode streams, or prefixes of them, to coefficients float64 [B, n].

        Raises ValueError, which names the first invalid token, and for an invalid header.
        """
        ids, lengths = tokens.ids[..., 0].cpu().numpy(), tokens.lengths.cpu().numpy()
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= ids.shape[1]:
            raise InputError(f"lengths from {lengths.min()} to {lengths.max()} of streams with {ids.shape[1]} tokens")
        planes, scan = self.grammar.check_header(tokens.header), self.scan
        values = np.zeros((len(ids), len(scan.order)))
        invalid = kernels.decode(
            ids, lengths, planes, self.config.final_threshold, scan.parent, scan.child, self.grammar.zerotree, values
        )
        self.grammar.check(ids, *invalid)
        return values

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        return pixels  # every prefix of planes approximates the full image

    def first_scales(self, tokens: Tokens, num_scales: int) -> Tokens:
        return keep_scales(tokens, self.layout, range(num_scales), self.grammar)

    # ------------------------------------------------------------------ start of new images

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the number of planes and the distribution of scaling coefficients, per class and for all images."""
        parts = []
        for pixels, labels in batches:
            values = self.to_coefficients(pixels)
            parts.append((self.planes_of(values), values[:, : SCALING * self.channels * 4], labels.numpy()))
        planes, firsts, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._starts = _Starts.measure(planes, self._scaling(firsts), classes, self.planes)

    def _scaling(self, firsts: np.ndarray) -> np.ndarray:
        """Scaling coefficients [B, 4 C]: the first group of the first block of each color plane."""
        return firsts.reshape(len(firsts), self.channels, 16)[:, :, :SCALING].reshape(len(firsts), -1)

    def statistics(self) -> dict[str, Any]:
        return self._starts.to_dict()

    def restore(self, statistics: dict[str, Any]) -> None:
        self._starts = _Starts.from_dict(statistics)

    def start_prefix(self, labels: Tensor, seeds: Sequence[int]) -> Tokens:
        """Draw the number of planes from the histogram of the class, scaling coefficients (of Y) from its Gaussian."""
        base = self.grammar.names.index("Insignificant")
        planes, ids = np.zeros(len(seeds), np.int64), np.zeros((len(seeds), SCALING), np.int64)
        lengths = np.zeros(len(seeds), np.int64)
        for row, (label, seed) in enumerate(zip(labels.tolist(), seeds, strict=True)):
            planes[row], scaling = self._starts.draw(label, np.random.default_rng([seed % 2**64, 1]))
            threshold = self.config.final_threshold * 2.0 ** (planes[row] - 1)
            first = scaling[:SCALING]
            sign = np.where(first > 0, kernels.POSITIVE, kernels.NEGATIVE)
            ids[row] = base + np.where(np.abs(first) >= threshold, sign, kernels.INSIGNIFICANT)
            # if the group is empty, the prior samples the whole block
            lengths[row] = SCALING if planes[row] and (np.abs(first) >= threshold).any() else 0
        header = torch.from_numpy(planes[:, None])
        return Tokens(torch.from_numpy(ids[..., None]), torch.from_numpy(lengths), header)

    def header_bits(self, tokens: Tokens, labels: Tensor) -> Tensor:
        return self._starts.bits(self.grammar.check_header(tokens.header), labels.cpu().numpy())


@dataclass
class _Starts:
    """Statistics of the start of images; row k is class k, the last row is all images together."""

    counts: np.ndarray
    """float64 [K + 1, P + 1]: number of images by number of planes."""
    means: np.ndarray
    """float64 [K + 1, 4 C]: mean scaling coefficients."""
    factors: np.ndarray
    """float64 [K + 1, 4 C, 4 C]: their covariance = factor · factorᵀ."""

    @classmethod
    def of_nothing(cls, planes: int, channels: int) -> _Starts:
        """Initial statistics before ``fit``: all numbers of planes are equally likely, and coefficients are 0."""
        width = SCALING * channels
        return cls(np.ones((1, planes + 1)), np.zeros((1, width)), np.zeros((1, width, width)))

    @classmethod
    def measure(cls, planes: np.ndarray, scaling: np.ndarray, labels: np.ndarray, most: int) -> _Starts:
        counts, means, factors = [], [], []
        for label in [*range(int(labels.max(initial=-1)) + 1), None]:
            in_class = np.ones(len(labels), bool) if label is None or not (labels == label).any() else labels == label
            counts.append(np.bincount(planes[in_class], minlength=most + 1).astype(float))
            means.append(scaling[in_class].mean(axis=0))
            covariance = (
                np.atleast_2d(np.cov(scaling[in_class], rowvar=False)) if in_class.sum() > 1 else np.zeros((1, 1))
            )
            values, vectors = np.linalg.eigh(np.broadcast_to(covariance, (scaling.shape[1],) * 2))
            factors.append(vectors * np.sqrt(values.clip(min=0)))
        return cls(np.stack(counts), np.stack(means), np.stack(factors))

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("counts", "means", "factors")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> _Starts:
        return cls(**{name: np.array(data[name], np.float64) for name in ("counts", "means", "factors")})

    def row(self, label: int) -> int:
        return label if 0 <= label < len(self.counts) - 1 else len(self.counts) - 1

    def draw(self, label: int, generator: np.random.Generator) -> tuple[int, np.ndarray]:
        row = self.row(label)
        number = int(generator.choice(self.counts.shape[1], p=self.counts[row] / self.counts[row].sum()))
        return number, self.means[row] + self.factors[row] @ generator.standard_normal(self.means.shape[1])

    def bits(self, planes: np.ndarray, labels: np.ndarray) -> Tensor:
        smooth = self.counts + 0.5  # so that unseen numbers of planes can be encoded too
        shares = smooth / smooth.sum(axis=1, keepdims=True)
        return torch.from_numpy(-np.log2([shares[self.row(label), n] for label, n in zip(labels, planes, strict=True)]))
