"""Cost of tokens in bits. Report a rate only with a distortion: a constant tokenizer has rate 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.layout import TokenLayout
from stages.measures.codes import CodeUse


@dataclass(frozen=True)
class ScaleRate:
    """Mean cost of one scale per image."""

    scale: str
    tokens_per_image: float
    """Number of elements; an element with several fields counts once."""
    fixed_length_bits: float
    """log2 of the vocabulary size, summed over tokens and fields."""
    entropy_bits: float
    """Entropy of the ids without context, summed over fields as if they were independent. Too low if a scale has few
    tokens for its vocabulary."""
    prior_bits: float | None = None
    """Bits under the prior, given all preceding elements; None without a prior."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def sums_of_scales(values: Sequence[float], layout: TokenLayout) -> list[float]:
    """Sum ``values``, one per element, over each scale of a layout of fixed length."""
    ends = layout.ends_of_scales
    return [sum(values[start:end]) for start, end in zip((0, *ends), ends, strict=False)]


def rates(
    uses: Sequence[CodeUse], num_images: int, layout: TokenLayout, prior: Sequence[float] | None = None
) -> list[ScaleRate]:
    """One entry per scale, from the code use in ``num_images`` images and the prior's bits per scale."""
    scale_rates: list[ScaleRate] = []
    for index, scale in enumerate(layout.scales):
        scale_uses = [use for use in uses if use.scale == scale.name]
        tokens = [use.num_tokens / num_images for use in scale_uses]
        scale_rates.append(
            ScaleRate(
                scale=scale.name,
                tokens_per_image=tokens[0] if tokens else 0.0,
                fixed_length_bits=sum(
                    n * math.log2(use.vocabulary_size) for n, use in zip(tokens, scale_uses, strict=True)
                ),
                entropy_bits=sum(n * math.log2(use.perplexity) for n, use in zip(tokens, scale_uses, strict=True)),
                prior_bits=None if prior is None else prior[index],
            )
        )
    return scale_rates


def total_rate(scales: Sequence[ScaleRate], num_pixels: int) -> dict[str, float]:
    """Total number of tokens of all scales, and their cost per pixel of an image of ``num_pixels``."""
    return {
        "tokens_per_image": sum(scale.tokens_per_image for scale in scales),
        "fixed_length_bits_per_pixel": sum(scale.fixed_length_bits for scale in scales) / num_pixels,
        "entropy_bits_per_pixel": sum(scale.entropy_bits for scale in scales) / num_pixels,
    }
