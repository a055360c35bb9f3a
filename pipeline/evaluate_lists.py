"""What ``eval`` says of lists: how long they are, what they hold, and how that follows quality and size."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from data.images.views import to_float, to_uint8
from data.layout import Tokens
from pipeline.config import Config
from pipeline.evaluation_images import Images
from stages.contract import Tokenizer
from stages.factory import build_grammar, build_tokenizer
from stages.lists import ListGrammar
from stages.measures.distortion import psnr
from stages.measures.reconstruction import Reconstructed
from stages.measures.upsampling import reduce_to
from stages.scales import scale_ids

QUALITIES = (10, 20, 35, 50, 80, 95)
TRIED = 200
"""Images that are coded at other qualities and sizes."""


def measure_lists(config: Config, tokenizer: Tokenizer, val: Images, made: Reconstructed) -> dict[str, Any] | None:
    """Lengths of held-out images' lists, the share of every scale, and both beside PSNR; None for other tokens."""
    layout = tokenizer.layout
    grammar = build_grammar(layout)
    if not isinstance(grammar, ListGrammar):
        return None
    lengths = made.tokens.lengths.double()
    scales = scale_ids(made.tokens, layout).masked_fill(~made.tokens.counted, -1)
    elements = [float((scales == number).sum()) / len(val) for number in range(len(layout.scales))]
    quantiles = lengths.quantile(torch.tensor([0.05, 0.5, 0.95, 1.0]).double()).tolist()
    return {
        "mean_length": float(lengths.mean()),
        "quantiles": dict(zip(("5%", "50%", "95%", "100%"), quantiles, strict=True)),
        "scales": [
            {"name": scale.name, "planes": scale.planes, "elements": mean, "share": mean / float(lengths.mean())}
            for scale, mean in zip(layout.scales, elements, strict=True)
        ],
        "planes": [
            {"name": name, "elements": mean, "share": mean / float(lengths.mean())}
            for name, mean in zip(("Y", "Cb", "Cr"), by_plane(made.tokens, grammar), strict=False)
        ],
        "tried": [
            try_setting(tokenizer, val.pixels[:TRIED], side, quality, config.eval.batch_size)
            for side in sides_of(layout.image_size[0])
            for quality in sorted({*QUALITIES, int(tokenizer.config.quality)})  # type: ignore[arg-type, union-attr]
        ],
    }


def by_plane(tokens: Tokens, grammar: ListGrammar) -> list[float]:
    """Mean elements of each plane in a list, without the end."""
    planes = grammar.plane_of[tokens.ids[..., 0]]
    real = tokens.counted & (tokens.ids[..., 0] != grammar.end)
    return [float((real & (planes == plane)).sum()) / len(tokens) for plane in range(len(grammar.grids))]


def sides_of(side: int) -> list[int]:
    """The full side, and those that averaging reduces it to, down to a quarter."""
    return [side // factor for factor in (4, 2, 1) if not side % factor]


@torch.inference_mode()
def try_setting(tokenizer: Tokenizer, pixels: Tensor, side: int, quality: int, batch_size: int) -> dict[str, Any]:
    """Lengths and PSNR of uint8 images at another quality and side."""
    images = reduce_to(pixels, side)
    settings = dataclasses.replace(tokenizer.config, quality=quality, max_length=0, largest_value=0)  # type: ignore[type-var, arg-type]
    other = build_tokenizer(settings, (side, side), tokenizer.channels)
    tokens: list[Tokens] = [other.encode(to_float(part)) for part in images.split(batch_size)]
    decoded = torch.cat([to_uint8(other.decode(part)) for part in tokens])
    lengths = torch.cat([part.lengths for part in tokens])
    return {
        "side": side,
        "quality": quality,
        "mean_length": float(lengths.double().mean()),
        "longest": int(lengths.max()),
        "psnr_mean_of_images": float(psnr(decoded, images).mean()),
    }
