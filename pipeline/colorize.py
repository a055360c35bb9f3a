"""colorize: turn a gray image into a color image. The luma is given; the prior samples the chroma.

This needs ``prior.order=luma_first``, in which a prior of color images writes luma before chroma (Nash et al., arXiv
2103.03841, section 5). The tokens represent the gray image only up to the tokenizer's error, so the luma of the result
is replaced by the exact luma of the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.source import decode
from data.images.views import plain_image, view_pixels
from data.layout import TokenLayout
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import Models, check_images, load_models
from pipeline.own_keys import ColorizeRequest
from pipeline.requests import find_inputs, parse_prompts, save_pictures, to_prompts
from stages.contract import Prompts
from stages.measures.pictures import sheet
from stages.prior.sampling import SamplingConfig
from stages.scales import keep_scales
from stages.spectral.colour import luma_of, with_luma

NUM_SHOWN = 8
"""Maximum number of inputs on the contact sheet."""


def luma_scales(layout: TokenLayout) -> list[int]:
    """Numbers of the scales that contain only luma. Raises RunError if there are none."""
    numbers = [number for number, scale in enumerate(layout.scales) if scale.planes == "luma"]
    if not numbers:
        raise RunError(
            "colorization needs separate tokens for luma and chroma: tokenizer.kind=sit with planes=ycbcr, or "
            "tokenizer.kind=sparse-dct, and images.channels=3"
        )
    return numbers


def check_colouring(models: Models) -> None:
    """Raise RunError for a tokenizer without separate luma, or a prior that does not write luma first."""
    luma_scales(models.tokenizer.layout)
    if models.prior.order != "luma_first":
        raise RunError(
            f"colorization needs a prior that writes luma first, this one has prior.order={models.prior.order}; train "
            "one with prior.order=luma_first"
        )


def colorize_pixels(
    models: Models, gray: Tensor, prompts: Prompts, settings: SamplingConfig, seeds: Sequence[int]
) -> Tensor:
    """Colorize gray images uint8 [B, 1, H, W] to uint8 [B, 3, H, W], with one prompt and one seed each.

    Raises RunError for images of another size, and for models that cannot colorize.
    """
    check_colouring(models)
    check_images(models.tokenizer, 3, *gray.shape[-2:])
    settings = dataclasses.replace(settings, scales=0)
    models.check(settings)
    layout = models.tokenizer.layout
    luma = luma_scales(layout)
    encoded = models.encode(gray.expand(-1, 3, -1, -1))
    if layout.ends == "fixed":
        tokens = models.draw(
            prompts, settings, seeds, known=encoded, keep=elements_of(layout, luma).expand(len(gray), -1)
        )
    else:
        tokens = models.draw(prompts, settings, seeds, prefix=keep_scales(encoded, layout, luma), whole=luma)
    return with_luma(models.decode(tokens), gray)


def elements_of(layout: TokenLayout, scales: Sequence[int]) -> Tensor:
    """Mask of the elements of some scales, bool [L], in a layout of fixed length."""
    chosen = torch.tensor([number in scales for number in range(len(layout.scales))])
    return chosen.repeat_interleave(torch.tensor([scale.length for scale in layout.scales]))


def read_gray(path: Path, images: ImagesConfig, color: str) -> Tensor:
    """Read the luma of an image file as uint8 [1, size, size], cropped and resized like the images of the run.

    Raises RunError for an image in color unless ``color`` is "drop", CorruptImage for an unreadable one.
    """
    image = plain_image(decode(path, str(path)), 3, images.background)
    pixels = view_pixels(image, images, images.eval_view)
    spread = pixels.int().amax(0) - pixels.int().amin(0)
    if color == "refuse" and int(spread.max()) > 0:
        raise RunError(f"{path} is in color; give a gray image, or color=drop to replace its color")
    return luma_of(pixels.unsqueeze(0))[0]


def colorize_images(config: Config, request: ColorizeRequest) -> Path:
    """Write ``sheet.png`` (input, results) and one PNG per result. Returns the path of the sheet."""
    if request.color not in ("refuse", "drop"):
        raise RunError(f"color={request.color}; allowed: refuse, drop")
    files = find_inputs(request.input)
    gray = [read_gray(file, config.images, request.color) for file in files]
    models = load_models(config)
    combinations = parse_prompts(request, models.prior, every_class=False)
    repeated = [prompt for prompt in combinations for _ in range(request.count)]
    prompts = to_prompts(models, repeated)
    out, rows = Path(request.out), []
    for number, (file, luma) in enumerate(zip(files, gray, strict=True)):
        seeds = [request.seed + number * len(repeated) + index for index in range(len(repeated))]
        colorized = colorize_pixels(models, luma.expand(len(repeated), -1, -1, -1), prompts, config.sampling, seeds)
        parts = zip(repeated, seeds, strict=True)
        names = [f"{file.stem}-{prompt.file_name + '-' if prompt.name else ''}{seed:06d}" for prompt, seed in parts]
        save_pictures(out, names, colorized)
        rows.append([luma.expand(3, -1, -1), *colorized])
    names = [prompt.name or f"{request.count} results" for prompt in combinations]
    columns = ["input", *(name if not index else "" for name in names for index in range(request.count))]
    sheet(rows[:NUM_SHOWN], [file.stem for file in files[:NUM_SHOWN]], columns).save(out / "sheet.png")
    print(f"wrote {out / 'sheet.png'} and {len(repeated) * len(files)} images beside it")
    return out / "sheet.png"
