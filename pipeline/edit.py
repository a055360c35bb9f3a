"""edit: keep an image's coarse scales, or what lies outside a mask, and let the prior write the rest anew.

What is notable here: frozen scales keep colour and layout, the scales after them follow the new class or text. The
encoder must be scale-causal: the coarse tokens of a dense one already know the fine pixels that are to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data.images.config import ImagesConfig
from data.images.source import decode
from data.images.views import plain_image, view_pixels
from data.layout import TokenLayout
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import DENSE_ENCODER, Models, check_images, load_models
from pipeline.own_keys import EditRequest
from pipeline.requests import find_inputs, parse_numbers, parse_prompts, save_pictures, to_prompts
from stages.contract import PrefixUnsupported, Prompts
from stages.measures.pictures import sheet
from stages.prior.sampling import SamplingConfig


def open_elements(layout: TokenLayout, mask: Tensor) -> Tensor:
    """Elements whose place a mask touches: bool [L] from bool [H, W]. Raises RunError for scales without a grid."""
    parts = []
    for scale in layout.scales:
        if scale.grid is None:
            raise RunError(f"a mask needs tokens with a place; the scale {scale.name} has no grid")
        parts.append(functional.adaptive_max_pool2d(mask.float()[None, None], scale.grid).flatten() > 0)
    return torch.cat(parts)


def check_frozen(layout: TokenLayout, frozen: int, masked: bool) -> None:
    """Raise RunError for a number of scales that cannot be kept, PrefixUnsupported for a dense encoder."""
    lowest = 0 if masked else 1
    if not lowest <= frozen < len(layout.scales):
        raise RunError(
            f"frozen={frozen}; allowed: {lowest} to {len(layout.scales) - 1} of the {len(layout.scales)} scales"
            + ("" if masked else " (0 with a mask)")
        )
    if frozen and not layout.keeps_prefixes:
        raise PrefixUnsupported(f"keeping scales needs a scale-causal encoder: {DENSE_ENCODER}")


def edit_pixels(
    models: Models,
    pixels: Tensor,
    frozen: int,
    prompts: Prompts,
    settings: SamplingConfig,
    seeds: Sequence[int],
    mask: Tensor | None = None,
) -> Tensor:
    """Edited images uint8 [B, C, H, W] of full-size ones, one prompt and one seed each.

    The first ``frozen`` scales stay; of the others only what ``mask`` bool [H, W] touches is drawn anew.
    Raises RunError for images of another size or number of channels, more scales than there are or nothing to keep,
    PrefixUnsupported for a dense encoder.
    """
    layout = models.tokenizer.layout
    # A smaller rung would pass the encoder, and come back as the large image that nobody gave.
    check_images(models.tokenizer, *pixels.shape[1:])
    check_frozen(layout, frozen, masked=mask is not None)
    if mask is not None and tuple(mask.shape) != tuple(pixels.shape[-2:]):
        raise RunError(f"a mask of {tuple(mask.shape)} for images of {tuple(pixels.shape[-2:])} pixels")
    settings = dataclasses.replace(settings, scales=0)
    models.check(settings)
    known = models.encode(pixels)
    prefix = models.tokenizer.first_scales(known, frozen) if frozen else None
    if prefix is not None and not prefix.lengths.all():
        raise RunError(
            f"frozen={frozen}: the first {frozen} of {len(layout.scales)} scales of an image are empty, so nothing "
            "of it would stay; keep more"
        )
    if mask is None:
        return models.decode(models.draw(prompts, settings, seeds, prefix=prefix, whole=range(frozen)))
    keep = ~open_elements(layout, mask)
    keep[: layout.prefix_length(frozen)] = True
    kept = keep.expand(len(prompts), -1)
    return models.decode(models.draw(prompts, settings, seeds, prefix=prefix, known=known, keep=kept))


def read_mask(path: str, image: Image.Image, name: str, images: ImagesConfig) -> Tensor:
    """bool [size, size]: where the mask, seen like the image called ``name``, is white.

    Raises RunError when their sizes differ, or where nothing is white.
    """
    if not Path(path).expanduser().is_file():
        raise RunError(f"mask={path}: no such image")
    grey = plain_image(decode(Path(path).expanduser(), path), 1, [0, 0, 0])
    size = plain_image(image, 1, [0, 0, 0]).size
    if grey.size != size:
        raise RunError(
            f"mask={path} has {grey.size[0]}x{grey.size[1]} px, {name} has {size[0]}x{size[1]}; make them equal"
        )
    as_image = dataclasses.replace(images, channels=1)
    mask = view_pixels(grey, as_image, images.eval_view)[0] >= 128
    if not mask.any():
        raise RunError(f"mask={path} is white nowhere that the run sees, so nothing would change; paint it white there")
    return mask


def edit_images(config: Config, request: EditRequest) -> Path:
    """Write a contact sheet an input (frozen scales by guidance) and one PNG a result. Returns the last sheet."""
    files = find_inputs(request.input)
    models = load_models(config)
    asked = parse_prompts(request, models.prior, every_class=False)
    steps = parse_numbers(request.frozen, "frozen")
    strengths = (
        parse_numbers(request.guidances, "guidances", float) if request.guidances else [config.sampling.guidance]
    )
    for frozen in steps:  # all of them before the first is drawn
        check_frozen(models.tokenizer.layout, frozen, masked=bool(request.mask))
    repeated = [prompt for prompt in asked for _ in range(request.count)]
    prompts = to_prompts(models, repeated)
    seeds = [request.seed + index for index in range(len(repeated))]
    out = Path(request.out)
    path = out
    for file in files:
        image = decode(file, str(file))
        pixels = view_pixels(image, config.images, config.images.eval_view)
        mask = read_mask(request.mask, image, str(file), config.images) if request.mask else None
        rows = []
        for frozen in steps:
            row = [pixels]
            for strength in strengths:
                settings = dataclasses.replace(config.sampling, guidance=strength)
                many = pixels.expand(len(repeated), -1, -1, -1)
                made = edit_pixels(models, many, frozen, prompts, settings, seeds, mask)
                where = f"{file.stem}-frozen{frozen}-guidance{strength:g}"
                pairs = zip(repeated, seeds, strict=True)
                save_pictures(out, [f"{where}-{prompt.file_name}-{seed:06d}" for prompt, seed in pairs], made)
                row.extend(made)
            rows.append(row)
        columns = ["original"] + [
            f"{prompt.name} g={strength:g}".strip() if not index else ""
            for strength in strengths
            for prompt in asked
            for index in range(request.count)
        ]
        path = out / f"{file.stem}-sheet.png"
        sheet(rows, [f"frozen {frozen}" for frozen in steps], columns).save(path)
        print(f"wrote {path}")
    return path
