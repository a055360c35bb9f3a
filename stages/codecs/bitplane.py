"""Bit-planes of wavelet coefficients as tokens: a tokenizer that needs no training.

After *Wavelets Are All You Need for Autoregressive Image Generation* (Mattar et al., arXiv 2406.19997).
What is notable here:

- each plane says of every coefficient whether it reaches the threshold T, its sign once it does, and from the next
  plane on which half of its interval it lies in; then T is halved. Every prefix of a stream decodes;
- a coefficient that was found errs by at most half of the final threshold, one that was not by less than all of it.
  The paper's text refines in the plane of discovery too; its own printed example and lengths do not, nor does this;
- colour is coded as Y, Cb and Cr, block by block in turn, so every prefix is an image in colour;
- all is exact: 8-bit integers first, float64 after, and halves of powers of two.
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
"""Scaling coefficients of a colour plane."""
WAVELETS = ("haar", "bior4.4")


class BitplaneCodec(Tokenizer):
    """Images with a side that is a power of two, in gray or RGB.

    Raises ValueError for another side, number of channels, wavelet or variant, and for thresholds that are no powers
    of two.
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
        for name, value, known in (
            ("wavelet", config.wavelet, WAVELETS),
            ("variant", config.variant, tuple(NAMES)),
        ):
            if value not in known:
                raise InputError(f"tokenizer.{name}={value!r}; allowed: {', '.join(known)}")
        final, start = config.final_threshold, config.start_threshold
        largest = largest_coefficient(side, config.wavelet) * (1 - 1e-9)
        most = 2.0 ** (math.ceil(math.log2(largest)) - 1)
        for name, threshold in (("final_threshold", final), ("start_threshold", start or final)):
            if math.frexp(threshold)[0] != 0.5 or not 2**-20 <= threshold <= most:
                raise InputError(f"tokenizer.{name}={threshold}; allowed: powers of two from 2^-20 to {most:g}")
        if start and start < final:
            raise InputError(f"tokenizer.start_threshold={start} is below tokenizer.final_threshold={final}")
        self.planes = 1 + round(math.log2((start or most) / final))
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
        """Coefficients float64 [B, n] in scan order of pixels in [-1, 1]. Raises ValueError for another size."""
        wanted = (self.channels, *self.layout.image_size)
        if pixels.shape[1:] != wanted:
            raise InputError(f"images {tuple(pixels.shape[1:])}; allowed: {wanted}")
        whole = np.round(127.5 * (pixels.detach().cpu().double().numpy() + 1)).clip(0, 255) / 255
        matrix = nested_dwt(to_ycbcr(whole) if self.channels == 3 else whole, self.config.wavelet)
        return np.ascontiguousarray(matrix.reshape(len(matrix), -1)[:, self.scan.order])

    def to_pixels(self, values: np.ndarray) -> Tensor:
        """Pixels float32 in [-1, 1], clamped, of coefficients [B, n] in scan order."""
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
        """Planes int64 [B] of coefficients [B, n]. Raises ValueError for one that a fixed start does not reach."""
        largest = np.abs(values).max(axis=1, initial=0)
        if self.config.start_threshold:
            wrong = np.flatnonzero(largest > 2 * self.config.start_threshold)
            if len(wrong):
                least = 2.0 ** (math.ceil(math.log2(largest[wrong[0]])) - 1)
                raise InputError(
                    f"image {wrong[0]} of the batch has a coefficient of {largest[wrong[0]]:g}: "
                    f"tokenizer.start_threshold={self.config.start_threshold:g} reaches twice as far only; "
                    f"use {least:g} or more, or 0 for each image's own"
                )
            return np.full(len(values), self.planes)
        # the paper's: a largest coefficient that is itself a power of two begins one plane lower and still errs no more
        exponent = np.ceil(np.log2(np.maximum(largest, 2.0**-40))).astype(np.int64) - 1
        return np.clip(exponent - round(math.log2(self.config.final_threshold)) + 1, 0, self.planes)

    def encode_coefficients(self, values: np.ndarray, planes: np.ndarray) -> Tokens:
        """Streams of coefficients float64 [B, n] that have ``planes`` [B]."""
        ids = np.zeros((len(values), values.shape[1] * int(planes.max(initial=0))), np.uint8)
        scan, final = self.scan, self.config.final_threshold
        lengths = kernels.encode(values, planes, final, scan.child, self.grammar.zerotree, ids)
        ids = ids[:, : lengths.max(initial=0), None].astype(np.int64)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(planes[:, None]))

    def decode(self, tokens: Tokens) -> Tensor:
        return self.to_pixels(self.decode_coefficients(tokens)).to(tokens.ids.device)

    def decode_coefficients(self, tokens: Tokens) -> np.ndarray:
        """Coefficients float64 [B, n] of streams or beginnings of them.

        Raises ValueError that names the first illegal token, or for a header that cannot be.
        """
        ids, lengths = tokens.ids[..., 0].cpu().numpy(), tokens.lengths.cpu().numpy()
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= ids.shape[1]:
            raise InputError(f"lengths from {lengths.min()} to {lengths.max()} of streams with {ids.shape[1]} tokens")
        planes, scan = self.grammar.check_header(tokens.header), self.scan
        values = np.zeros((len(ids), len(scan.order)))
        wrong = kernels.decode(
            ids, lengths, planes, self.config.final_threshold, scan.parent, scan.child, self.grammar.zerotree, values
        )
        self.grammar.check(ids, *wrong)
        return values

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        return pixels  # every plane decodes to a likeness of the whole image

    def first_scales(self, tokens: Tokens, num_scales: int) -> Tokens:
        return keep_scales(tokens, self.layout, range(num_scales), self.grammar)

    # ------------------------------------------------------------------ how new images begin

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure how many planes images have and how their scaling coefficients vary, for each class and for all."""
        parts = []
        for pixels, labels in batches:
            values = self.to_coefficients(pixels)
            parts.append((self.planes_of(values), values[:, : SCALING * self.channels * 4], labels.numpy()))
        planes, firsts, classes = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._starts = _Starts.measure(planes, self._scaling(firsts), classes, self.planes)

    def _scaling(self, firsts: np.ndarray) -> np.ndarray:
        """Scaling coefficients [B, 4 C]: the first group of the first block of each colour plane."""
        return firsts.reshape(len(firsts), self.channels, 16)[:, :, :SCALING].reshape(len(firsts), -1)

    def statistics(self) -> dict[str, Any]:
        return self._starts.to_dict()

    def restore(self, statistics: dict[str, Any]) -> None:
        self._starts = _Starts.from_dict(statistics)

    def start_prefix(self, labels: Tensor, seeds: Sequence[int]) -> Tokens:
        """Planes from the class's histogram, and tokens of the scaling coefficients (of Y) from its Gaussian."""
        base = self.grammar.names.index("Insignificant")
        planes, ids = np.zeros(len(seeds), np.int64), np.zeros((len(seeds), SCALING), np.int64)
        lengths = np.zeros(len(seeds), np.int64)
        for row, (label, seed) in enumerate(zip(labels.tolist(), seeds, strict=True)):
            planes[row], scaling = self._starts.draw(label, np.random.default_rng([seed % 2**64, 1]))
            threshold = self.config.final_threshold * 2.0 ** (planes[row] - 1)
            first = scaling[:SCALING]
            found = np.where(first > 0, kernels.POSITIVE, kernels.NEGATIVE)
            ids[row] = base + np.where(np.abs(first) >= threshold, found, kernels.INSIGNIFICANT)
            # where the group is empty, the prior decides what else the block holds
            lengths[row] = SCALING if planes[row] and (np.abs(first) >= threshold).any() else 0
        header = torch.from_numpy(planes[:, None])
        return Tokens(torch.from_numpy(ids[..., None]), torch.from_numpy(lengths), header)

    def header_bits(self, tokens: Tokens, labels: Tensor) -> Tensor:
        return self._starts.bits(self.grammar.check_header(tokens.header), labels.cpu().numpy())


@dataclass
class _Starts:
    """How images begin; row k is class k, the last row is all images together."""

    counts: np.ndarray
    """float64 [K + 1, P + 1]: images by number of planes."""
    means: np.ndarray
    """float64 [K + 1, 4 C]"""
    factors: np.ndarray
    """float64 [K + 1, 4 C, 4 C]: covariance = factor · factorᵀ"""

    @classmethod
    def of_nothing(cls, planes: int, channels: int) -> _Starts:
        """Before anything was measured: all numbers of planes are as likely, and nothing is known of coefficients."""
        width = SCALING * channels
        return cls(np.ones((1, planes + 1)), np.zeros((1, width)), np.zeros((1, width, width)))

    @classmethod
    def measure(cls, planes: np.ndarray, scaling: np.ndarray, labels: np.ndarray, most: int) -> _Starts:
        counts, means, factors = [], [], []
        for label in [*range(int(labels.max(initial=-1)) + 1), None]:
            mine = np.ones(len(labels), bool) if label is None or not (labels == label).any() else labels == label
            counts.append(np.bincount(planes[mine], minlength=most + 1).astype(float))
            means.append(scaling[mine].mean(axis=0))
            spread = np.atleast_2d(np.cov(scaling[mine], rowvar=False)) if mine.sum() > 1 else np.zeros((1, 1))
            values, vectors = np.linalg.eigh(np.broadcast_to(spread, (scaling.shape[1],) * 2))
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
        smooth = self.counts + 0.5  # a number that was never seen can be sent, too
        shares = smooth / smooth.sum(axis=1, keepdims=True)
        return torch.from_numpy(-np.log2([shares[self.row(label), n] for label, n in zip(labels, planes, strict=True)]))
