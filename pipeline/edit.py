"""edit: keep the coarse scales of an image, or the area outside a mask, and let the prior sample the rest again.

Frozen scales keep color and layout; the later scales follow the new class or text. The encoder must be scale-causal:
the coarse tokens of a dense encoder already contain information about the fine details that are to change.
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
    """Elements that overlap a mask: bool [L] from bool [H, W]. Raises RunError for scales without a grid."""
    parts = []
    for scale in layout.scales:
        if scale.grid is None:
            raise RunError(f"a mask needs tokens with a position; the scale {scale.name} has no grid")
        parts.append(functional.adaptive_max_pool2d(mask.float()[None, None], scale.grid).flatten() > 0)
    return torch.cat(parts)


def check_frozen(layout: TokenLayout, frozen: int, masked: bool) -> None:
    """Raise RunError for an invalid number of frozen scales, PrefixUnsupported for a dense encoder."""
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
    """Edit full-size images uint8 [B, C, H, W], with one prompt and one seed each.

    The first ``frozen`` scales are kept. Of the others, only the elements that overlap ``mask`` bool [H, W] are sampled
    again (None: all). Raises RunError for images of another size or number of channels, for an invalid number of
    scales, and if nothing would be kept; PrefixUnsupported for a dense encoder.
    """
    layout = models.tokenizer.layout
    # The encoder would also accept a smaller rung, but the result would have the full size.
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
            "of it would be kept; increase frozen"
        )
    if mask is None:
        return models.decode(models.draw(prompts, settings, seeds, prefix=prefix, whole=range(frozen)))
    keep = ~open_elements(layout, mask)
    keep[: layout.prefix_length(frozen)] = True
    kept = keep.expand(len(prompts), -1)
    return models.decode(models.draw(prompts, settings, seeds, prefix=prefix, known=known, keep=kept))


def read_mask(path: str, image: Image.Image, name: str, images: ImagesConfig) -> Tensor:
    """Read a mask as bool [size, size], True where it is white, cropped and resized like the image called ``name``.

    Raises RunError if their sizes differ or nothing is white.
    """
    if not Path(path).expanduser().is_file():
        raise RunError(f"mask={path}: no such image")
    gray = plain_image(decode(Path(path).expanduser(), path), 1, [0, 0, 0])
    size = plain_image(image, 1, [0, 0, 0]).size
    if gray.size != size:
        raise RunError(
            f"mask={path} has {gray.size[0]}x{gray.size[1]} px, {name} has {size[0]}x{size[1]}; make them equal"
        )
    as_image = dataclasses.replace(images, channels=1)
    mask = view_pixels(gray, as_image, images.eval_view)[0] >= 128
    if not mask.any():
        raise RunError(
            f"mask={path} has no white inside the crop of the run, so nothing would change; paint some white"
        )
    return mask


def edit_images(config: Config, request: EditRequest) -> Path:
    """Write one contact sheet per input (frozen scales by guidance) and one PNG per result. Returns the last sheet."""
    files = find_inputs(request.input)
    models = load_models(config)
    combinations = parse_prompts(request, models.prior, every_class=False)
    steps = parse_numbers(request.frozen, "frozen")
    strengths = (
        parse_numbers(request.guidances, "guidances", float) if request.guidances else [config.sampling.guidance]
    )
    for frozen in steps:  # check all of them before sampling
        check_frozen(models.tokenizer.layout, frozen, masked=bool(request.mask))
    repeated = [prompt for prompt in combinations for _ in range(request.count)]
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
                batch = pixels.expand(len(repeated), -1, -1, -1)
                edited = edit_pixels(models, batch, frozen, prompts, settings, seeds, mask)
                stem = f"{file.stem}-frozen{frozen}-guidance{strength:g}"
                pairs = zip(repeated, seeds, strict=True)
                save_pictures(out, [f"{stem}-{prompt.file_name}-{seed:06d}" for prompt, seed in pairs], edited)
                row.extend(edited)
            rows.append(row)
        columns = ["original"] + [
            f"{prompt.name} g={strength:g}".strip() if not index else ""
            for strength in strengths
            for prompt in combinations
            for index in range(request.count)
        ]
        path = out / f"{file.stem}-sheet.png"
        sheet(rows, [f"frozen {frozen}" for frozen in steps], columns).save(path)
        print(f"wrote {path}")
    return path
