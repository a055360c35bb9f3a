"""What tokens cost in bits. A rate says something only beside a distortion: a constant tokenizer costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.layout import TokenLayout
from stages.measures.codes import CodeUse


@dataclass(frozen=True)
class ScaleRate:
    """Mean cost of one scale in one image."""

    scale: str
    tokens_per_image: float
    """Elements; one with several fields counts once."""
    fixed_length_bits: float
    """log2 of the vocabulary for every token, summed over fields."""
    entropy_bits: float
    """Entropy of the ids without any context; too low where a scale has few tokens for its vocabulary. Of several
    fields the sum, as if they told nothing of each other."""
    prior_bits: float | None = None
    """Under the prior, given everything before; None without a prior."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def sums_of_scales(values: Sequence[float], layout: TokenLayout) -> list[float]:
    """One sum a scale of ``values``, one an element, in a layout of fixed length."""
    ends = layout.ends_of_scales
    return [sum(values[start:end]) for start, end in zip((0, *ends), ends, strict=False)]


def rates(
    uses: Sequence[CodeUse], num_images: int, layout: TokenLayout, prior: Sequence[float] | None = None
) -> list[ScaleRate]:
    """One entry a scale, from the use of codes in ``num_images`` images and the prior's bits per scale."""
    found: list[ScaleRate] = []
    for index, scale in enumerate(layout.scales):
        mine = [use for use in uses if use.scale == scale.name]
        tokens = [use.num_tokens / num_images for use in mine]
        found.append(
            ScaleRate(
                scale=scale.name,
                tokens_per_image=tokens[0] if tokens else 0.0,
                fixed_length_bits=sum(n * math.log2(use.vocabulary_size) for n, use in zip(tokens, mine, strict=True)),
                entropy_bits=sum(n * math.log2(use.perplexity) for n, use in zip(tokens, mine, strict=True)),
                prior_bits=None if prior is None else prior[index],
            )
        )
    return found


def total_rate(scales: Sequence[ScaleRate], num_pixels: int) -> dict[str, float]:
    """Tokens of all scales together, and what they cost for each pixel of an image of ``num_pixels``."""
    return {
        "tokens_per_image": sum(scale.tokens_per_image for scale in scales),
        "fixed_length_bits_per_pixel": sum(scale.fixed_length_bits for scale in scales) / num_pixels,
        "entropy_bits_per_pixel": sum(scale.entropy_bits for scale in scales) / num_pixels,
    }
