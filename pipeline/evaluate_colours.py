"""Colouring in ``eval``: held-out images lose their colour and are given another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.colorize import check_colouring, colorize_pixels
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.evaluation_images import Images, prompts_of
from pipeline.evaluation_pictures import show_columns
from pipeline.models import Models
from stages.measures.colouring import measure_coloured
from stages.measures.reconstruction import Judge, Reconstructed
from stages.spectral.colour import chroma_of, luma_of, with_chroma, with_luma

SHOWN, SAMPLES_SHOWN = 8, 3
"""Images on the contact sheet, and coloured versions of each."""


def check_order(config: Config, models: Models) -> None:
    """Raise RunError for what the config asks for and the order of this prior forbids."""
    if config.eval.num_colorized:
        check_colouring(models)
    for key in ("upsample_from", "edit_frozen"):
        if getattr(config.eval, key) and not models.prior.writes_prefixes:
            raise RunError(
                f"eval.{key}={getattr(config.eval, key)}: this prior has prior.order={models.prior.order}, and what is "
                "given begins an image in natural order only"
            )


def measure_colouring(
    config: Config,
    folder: Path,
    models: Models,
    val: Images,
    made: Reconstructed,
    train: Images,
    judge: Judge | None,
) -> dict[str, Any]:
    """Coloured images beside gray ones, the mean chroma of the training images, and the code's own chroma."""
    rows = torch.arange(min(config.eval.num_colorized, len(val)))
    original, asked = val.pixels[rows], val[rows]
    gray = luma_of(original)
    prompts = prompts_of(models, asked.labels, asked.texts)
    seeds = [config.eval.seed + row for row in rows.tolist()]
    coloured = colorize_pixels(models, gray, prompts, config.sampling, seeds)
    parts = [chroma_of(part).sum((0, 2, 3)) for part in train.pixels.split(1000)]
    mean = (torch.stack(parts).sum(0) / train.pixels[:, 0].numel())[None, :, None, None]
    results = {
        "coloured": coloured,
        "gray": gray.expand(-1, 3, -1, -1),
        "mean_chroma": with_chroma(gray, mean),
        "bound": with_luma(made.pixels[rows], gray),
        "original": original,
    }
    shown = rows[:SHOWN]
    first = prompts[shown]
    others = [
        colorize_pixels(
            models, gray[shown], first, config.sampling, [seed + version * len(rows) for seed in seeds[:SHOWN]]
        )
        for version in range(1, SAMPLES_SHOWN)
    ]
    columns = [("original", original), ("gray", results["gray"]), ("mean chroma", results["mean_chroma"])]
    columns += [(f"coloured {n}", each) for n, each in enumerate([coloured[shown], *others], 1)]
    show_columns(folder / "colouring.png", columns, (), SHOWN)
    told = models.prior.condition
    return {
        "num_images": len(rows),
        "prompts": "each image's own" if told.uses_labels or told.uses_text else "none",
        "seeds": [seeds[0], seeds[-1]],
        "sampling": to_plain(config.sampling),
        "mean_chroma": mean.flatten().tolist(),
        "rows": {name: measure_coloured(result, original, judge) for name, result in results.items()},
    }
