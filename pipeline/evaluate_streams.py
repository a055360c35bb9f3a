"""What ``eval`` measures and shows of tokenizers whose tokens are streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.layout import Tokens
from pipeline.config import Config
from pipeline.evaluation_images import Images, prompts_of
from pipeline.models import Models
from stages.contract import Tokenizer
from stages.factory import build_grammar
from stages.measures.pictures import sheet
from stages.measures.reconstruction import Reconstructed
from stages.measures.streams import measure_streams


def measure_rates(
    config: Config,
    tokenizer: Tokenizer,
    models: Models | None,
    val: Images,
    made: Reconstructed,
    measured: dict[str, Any],
) -> dict[str, Any] | None:
    """Rate beside distortion for every number of scales, in bits for each pixel; None for fixed lengths."""
    layout = tokenizer.layout
    grammar = build_grammar(layout)
    if grammar is None:
        return None
    found = measure_streams(
        grammar,
        len(layout.scales),
        made.tokens,
        tokenizer.header_bits(made.tokens, val.labels),
        config.eval.batch_size,
        None if models is None else models.prior,
        None if models is None else prompts_of(models, val.labels, val.texts),
    )
    num_pixels = layout.image_size[0] * layout.image_size[1]
    psnr = {entry["num_scales"]: entry["psnr_against_images"] for entry in measured["prefixes"]}
    for number, entry in enumerate(found["prefixes"], 1):
        entry |= {"num_scales": number, "name": layout.scales[number - 1].name, "psnr_mean_of_images": psnr.get(number)}
        for kind in ("uniform", "prior"):
            if entry.get(f"{kind}_bits") is not None:
                entry[f"{kind}_bits_per_pixel"] = entry[f"{kind}_bits"] / num_pixels
    return found


def bits_of_scales(streams: dict[str, Any]) -> list[float] | None:
    """The prior's mean bits of each scale; None without a prior, or where it models beginnings only."""
    bits = [scale.get("prior") for scale in streams["scales"]]
    return None if any(each is None for each in bits) else bits


def show_finished(config: Config, folder: Path, models: Models, val: Images, tokens: Tokens, shown: int = 6) -> None:
    """Held-out images from their first scales on: what was given, and three ends of it that the prior writes."""
    layout = models.tokenizer.layout
    if layout.ends == "fixed" or models.prior.order != "natural":
        return
    rows: list[list[Tensor]] = []
    names: list[str] = []
    kept = [k for k in (len(layout.scales) - 2, len(layout.scales) - 1) if k > 0]
    some = torch.arange(min(shown, len(val)))
    asked = val[some]
    for k in kept:
        prefix = models.tokenizer.first_scales(tokens[some], k)
        if prefix.ids.shape[1] >= models.prior.max_length:
            continue  # nothing is left to be written
        prompts = prompts_of(models, asked.labels, asked.texts)
        given = models.decode(prefix)
        ends = [
            models.decode(
                models.draw(prompts, config.sampling, [config.eval.seed + n] * len(some), prefix, whole=range(k))
            )
            for n in range(3)
        ]
        rows += [[asked.pixels[i], given[i], *(end[i] for end in ends)] for i in range(len(some))]
        names += [layout.scales[k - 1].name] * len(some)
    if rows:
        sheet(rows, names, ["original", "given", "end 1", "end 2", "end 3"]).save(folder / "finished.png")
