"""What eval finds out about a head: its images at the tokenizer's own size and at larger ones, beside bicubic's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images.reading import pixels_of
from data.images.source import ImageSource
from data.images.views import smaller_side, to_uint8
from data.layout import Tokens
from pipeline.config import Config
from pipeline.evaluation_images import Images
from stages.contract import Tokenizer
from stages.measures.distortion import psnr
from stages.measures.pictures import sheet
from stages.measures.reconstruction import Judge, Reconstructed, measure_distortion
from stages.measures.upsampling import enlarge

SHOWN = 8
"""Images on the sheet."""


def measure_head(
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    source: ImageSource,
    val: Images,
    made: Reconstructed,
    judge: Judge | None,
    device: torch.device,
    skipped: list[str],
) -> dict[str, Any] | None:
    """The head at the own size beside the decoder, and at every multiple of ``eval.head_sizes`` beside the photos.

    Images whose smaller side is stored smaller than that are left out; None where none is left, or nothing was asked.
    Draws ``head.png``.
    """
    if not config.eval.head_sizes:
        return None
    own, count = tokenizer.layout.image_size[0], min(config.eval.num_head, len(val))
    sides = [round(own * multiple) for multiple in config.eval.head_sizes]
    known = [smaller_side(source[index].image) >= max(sides) for index in val.indices[:count]]
    rows = torch.tensor(known).nonzero()[:, 0]
    if not len(rows):
        skipped.append(f"the head at {max(sides)} px: none of the first {count} images is stored that large")
        return None
    found: dict[str, Any] = {"num_images": len(rows), "own_size": own, "sizes": []}
    tokens, decoded = made.tokens[rows], made.pixels[rows]
    indices = [val.indices[row] for row in rows.tolist()]
    columns: list[tuple[str, Tensor]] = []
    for side in dict.fromkeys((own, *sides)):
        rendered = render_all(tokenizer, tokens, side, config.eval.batch_size, device)
        original = pixels_of(source, indices, dataclasses.replace(config.images, size=side))
        bicubic = decoded if side == own else torch.cat([enlarge(part, side) for part in decoded.split(256)])
        entry: dict[str, Any] = {"image_size": [side, side]}
        if side == own:
            entry["head_against_decoded"] = float(psnr(rendered, decoded).mean())
        for name, images in (("head", rendered), ("decoded" if side == own else "bicubic_of_decoded", bicubic)):
            entry[name] = measure_distortion(original, images, judge, f"the photos at {side} px")
        found["sizes"].append(entry)
        columns += [(f"{side} px", original), ("decoded" if side == own else "bicubic", bicubic), ("head", rendered)]
    shown = [[images[row] for _, images in columns] for row in range(min(SHOWN, len(rows)))]
    sheet(shown, column_labels=[name for name, _ in columns]).save(folder / "head.png")
    return found


@torch.inference_mode()
def render_all(tokenizer: Tokenizer, tokens: Tokens, side: int, batch_size: int, device: torch.device) -> Tensor:
    """uint8 [N, C, side, side] of all tokens."""
    parts = tokens.split(batch_size)
    return torch.cat([to_uint8(tokenizer.render(part.to(device), (side, side))).cpu() for part in parts])
