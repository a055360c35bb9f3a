"""Measures of a tokenizer on held-out images: distortion, code use, prefixes of scales, and rate with distortion."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.images.views import to_float, to_uint8
from data.layout import Tokens
from stages.contract import Prior, PriorOutput, Prompts, Tokenizer
from stages.measures.codes import CodeUse, code_use
from stages.measures.distortion import SMALLEST_SSIM, decibels, mean_squared_error, psnr, ssim
from stages.measures.frechet import measure_frechet
from stages.measures.perceptual import SMALLEST_PERCEPTUAL, Lite0Perceptual
from stages.measures.rate import rates, total_rate

ORIGINALS = "the originals of these reconstructions"
JUDGED_PREFIX_IMAGES = 500
"""Images per prefix for perceptual measures: a layout may report many prefixes, and these measures are slow."""


@dataclass(frozen=True)
class Judge:
    """Lite0's distance and features, their device, and whether the tokenizer was trained against them."""

    perceptual: Lite0Perceptual
    device: torch.device
    same_backbone_as_loss: bool

    @torch.inference_mode()
    def distance(self, prediction: Tensor, target: Tensor, size: int = 64) -> Tensor:
        """Perceptual distance [N] between corresponding uint8 images [N, C, H, W]."""
        pairs = zip(prediction.split(size), target.split(size), strict=True)
        return torch.cat([self.perceptual(self.floats(a), self.floats(b)).cpu() for a, b in pairs])

    @torch.inference_mode()
    def features(self, pixels: Tensor, size: int = 64) -> Tensor:
        """Pooled features [N, 112] of uint8 images [N, C, H, W]."""
        return torch.cat([self.perceptual.features(self.floats(part)).cpu() for part in pixels.split(size)])

    @torch.inference_mode()
    def spatial(self, pixels: Tensor, size: int = 64) -> Tensor:
        """Spatial features [N, 448] of uint8 images [N, C, H, W]."""
        return torch.cat([self.perceptual.spatial(self.floats(part)).cpu() for part in pixels.split(size)])

    def floats(self, pixels: Tensor) -> Tensor:
        """Convert uint8 images to floats in [-1, 1] on the device."""
        return to_float(pixels.to(self.device))

    def frechet(self, real: Tensor, judged: Tensor, reference: str) -> dict[str, Any]:
        """Fréchet distance between two sets of these features, with everything it depends on."""
        return measure_frechet(real, judged, reference, self.same_backbone_as_loss)


@dataclass(frozen=True)
class Reconstructed:
    """Held-out images after encoding and decoding."""

    pixels: Tensor
    """uint8 [N, C, H, W]"""
    tokens: Tokens
    """Tokens on the CPU."""
    encode_seconds: float
    decode_seconds: float


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, pixels: Tensor, batch_size: int, device: torch.device) -> Reconstructed:
    """Encode and decode uint8 images [N, C, H, W]; the measured seconds include transfers between devices."""
    started = time.perf_counter()
    encoded = [tokenizer.encode(to_float(batch.to(device))).to("cpu") for batch in pixels.split(batch_size)]
    encoded_at = time.perf_counter()
    decoded = torch.cat([to_uint8(tokenizer.decode(tokens.to(device))).cpu() for tokens in encoded])
    decoded_at = time.perf_counter()
    return Reconstructed(decoded, Tokens.cat(encoded), encoded_at - started, decoded_at - encoded_at)


def measure_reconstruction(pixels: Tensor, made: Reconstructed, judge: Judge | None) -> dict[str, Any]:
    """Distortion and speed of reconstructions of uint8 ``pixels``; perceptual measures only with a judge."""
    measured = {
        "num_images": len(pixels),
        "encode_images_per_second": len(pixels) / made.encode_seconds,
        "decode_images_per_second": len(pixels) / made.decode_seconds,
        **measure_distortion(pixels, made.pixels, judge, ORIGINALS),
    }
    if judge is not None:
        measured["sfd_lite0"] = judge.frechet(judge.spatial(pixels), judge.spatial(made.pixels), ORIGINALS)
    return measured


def measure_distortion(pixels: Tensor, made: Tensor, judge: Judge | None, reference: str) -> dict[str, Any]:
    """Distortion of uint8 images ``made`` [N, C, H, W] against ``pixels``, which the result calls ``reference``.

    SSIM is left out for images smaller than its window, and perceptual measures are left out without a judge.
    """
    chunks = zip(made.split(256), pixels.split(256), strict=True)
    error = torch.cat([mean_squared_error(a, b) for a, b in chunks])
    measured: dict[str, Any] = {
        "psnr_mean_of_images": float(decibels(error).mean()),
        "psnr_of_mean_error": float(decibels(error.mean())),
    }
    side = min(pixels.shape[-2:])
    if side >= SMALLEST_SSIM:
        parts = zip(made.split(256), pixels.split(256), strict=True)
        measured["ssim"] = float(torch.cat([ssim(a, b) for a, b in parts]).mean())
    return measured if judge is None else measured | measure_judged(pixels, made, judge, reference)


def measure_judged(pixels: Tensor, made: Tensor, judge: Judge, reference: str) -> dict[str, Any]:
    """The perceptual measures of ``measure_distortion``, which need a judge."""
    measured: dict[str, Any] = {}
    if min(pixels.shape[-2:]) >= SMALLEST_PERCEPTUAL:
        measured["perceptual_lite0"] = {
            "mean": float(judge.distance(made, pixels).mean()),
            "same_backbone_as_loss": judge.same_backbone_as_loss,
        }
    return measured | {"fd_lite0": judge.frechet(judge.features(pixels), judge.features(made), reference)}


@dataclass(frozen=True)
class Prefix:
    """Held-out images decoded from their first scales."""

    num_scales: int
    wanted: Tensor
    """uint8 [N, C, h, w]: the tokenizer's reference for these scales."""
    decoded: Tensor
    """uint8 [N, C, h, w]."""


@torch.inference_mode()
def decode_prefixes(
    tokenizer: Tokenizer, pixels: Tensor, tokens: Tokens, batch_size: int, device: torch.device
) -> Iterator[Prefix]:
    """Yield every prefix of scales that the layout reports; none if prefixes cannot be decoded."""
    layout = tokenizer.layout
    for k in layout.prefixes if layout.decodes_prefixes else ():
        wanted, decoded = [], []
        for images, part in zip(pixels.split(batch_size), tokens.split(batch_size), strict=True):
            wanted.append(to_uint8(tokenizer.reference(to_float(images.to(device)), k)).cpu())
            decoded.append(to_uint8(tokenizer.decode(tokenizer.first_scales(part, k).to(device))).cpu())
        yield Prefix(k, torch.cat(wanted), torch.cat(decoded))


def measure_prefix(prefix: Prefix, pixels: Tensor, judge: Judge | None) -> dict[str, Any]:
    """Distortion of a prefix against its reference, and its PSNR against the uint8 ``pixels`` if the sizes are equal.

    Perceptual measures use the first ``JUDGED_PREFIX_IMAGES`` images.
    """
    reference, judged = "what these scales should look like", slice(JUDGED_PREFIX_IMAGES)
    measured = {
        "num_scales": prefix.num_scales,
        "image_size": list(prefix.decoded.shape[-2:]),
        **measure_distortion(prefix.wanted, prefix.decoded, None, reference),
    }
    if judge is not None:
        measured |= measure_judged(prefix.wanted[judged], prefix.decoded[judged], judge, reference)
    if prefix.decoded.shape[-2:] == pixels.shape[-2:]:
        parts = zip(prefix.decoded.split(256), pixels.split(256), strict=True)
        measured["psnr_against_images"] = float(torch.cat([psnr(a, b) for a, b in parts]).mean())
    return measured


class Said(NamedTuple):
    """Scores of held-out tokens of fixed length under a prior."""

    bits: list[float]
    """Mean bits of each token."""
    confidence: Tensor | None
    """float32 [N, L, F], as in ``PriorOutput``."""
    hit: Tensor | None
    """bool [N, L, F], as in ``PriorOutput``."""


@torch.inference_mode()
def measure_nll(prior: Prior, tokens: Tokens, prompts: Prompts, batch_size: int, device: torch.device) -> Said:
    """Score held-out tokens of a layout of fixed length, with their prompts, under the prior."""
    starts = range(0, len(prompts), batch_size)
    prompt_parts = (prompts[start : start + batch_size].to(device) for start in starts)
    total = torch.zeros(prior.layout.length, dtype=torch.float64)
    confidence, hit = [], []
    for part, part_prompts in zip(tokens.split(batch_size), prompt_parts, strict=True):
        output: PriorOutput = prior(part.to(device), part_prompts)
        total += output.nll.cpu().double().sum((0, 2)) / math.log(2)
        if output.confidence is not None and output.hit is not None:
            confidence.append(output.confidence.cpu())
            hit.append(output.hit.cpu())
    has_confidence = bool(confidence)
    return Said(
        (total / len(tokens)).tolist(),
        torch.cat(confidence) if has_confidence else None,
        torch.cat(hit) if has_confidence else None,
    )


def measure_rate(
    tokenizer: Tokenizer,
    tokens: Tokens,
    bits: Sequence[float] | None,
    distortion: dict[str, Any],
    header_bits: float = 0.0,
) -> tuple[dict[str, Any], list[CodeUse]]:
    """Returns (entry with bits per pixel and the distortion at that rate, code use).

    ``bits`` are the prior's bits per scale; ``header_bits`` are the additional bits of the side information.
    """
    uses = code_use(tokens, tokenizer.layout)
    scales = rates(uses, len(tokens), tokenizer.layout, bits)
    height, width = tokenizer.layout.image_size
    num_pixels = height * width
    total = total_rate(scales, num_pixels)
    entry = {
        "unit": "bits per pixel of the image, all its channels together",
        **total,
        "header_bits": header_bits,
        "prior_bits_per_pixel": None if bits is None else (header_bits + sum(bits)) / num_pixels,
        "prior_bits_per_token": None if bits is None else sum(bits) / total["tokens_per_image"],
        "scales": [scale.to_dict() for scale in scales],
    }
    distortion_keys = ("psnr_mean_of_images", "ssim", "perceptual_lite0")
    return entry | {key: distortion[key] for key in distortion_keys if key in distortion}, uses
