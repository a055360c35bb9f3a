"""What ``eval`` measures of the first scales: their distortion, and the frequencies that they carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config
from pipeline.evaluation_images import Images
from pipeline.evaluation_pictures import prefix_name
from pipeline.report_frequencies import draw_frequencies
from stages.contract import Tokenizer
from stages.measures.reconstruction import Judge, Reconstructed, decode_prefixes, measure_prefix
from stages.measures.spectrum import SMALLEST_SIDE, measure_frequencies, power_spectrum


def measure_scales(
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    val: Images,
    made: Reconstructed,
    judge: Judge | None,
    device: torch.device,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """(distortion of every prefix of scales, power spectra of all reconstructions over the images').

    Where prefixes do not decode, the first is empty and the second has one row, of whole images; None for images too
    small or not square. Draws ``frequencies.png``.
    """
    layout = tokenizer.layout
    height, width = layout.image_size
    images = power_spectrum(val.pixels) if height == width and height >= SMALLEST_SIDE else None
    prefixes, rows = [], []
    for prefix in decode_prefixes(tokenizer, val.pixels, made.tokens, config.eval.batch_size, device):
        prefixes.append(measure_prefix(prefix, val.pixels, judge))
        found = None if images is None else measure_frequencies(images, prefix.decoded, prefix.wanted)
        if found is not None:
            rows.append({"name": prefix_name(layout, prefix.num_scales), "num_scales": prefix.num_scales, **found})
    if images is None:
        return prefixes, None
    if not rows:
        found = measure_frequencies(images, made.pixels, val.pixels)
        assert found is not None
        rows = [{"name": "all", "num_scales": len(layout.scales), **found}]
    spectrum = {
        "unit": "dB over the images' power at the same cycles a side",
        "images": images.tolist(),
        "octaves_from": [2**number for number in range(len(rows[-1]["decoded_octaves"]))],
        "rows": rows,
    }
    draw_frequencies(spectrum, folder / "frequencies.png")
    return prefixes, spectrum
