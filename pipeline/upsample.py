"""upsample: enlarge small images. Their tokens are the first scales; the prior samples the others.

This needs no training. A scale-causal encoder encodes a small image to exactly the first tokens of the large one, so
upsampling is sampling with a prefix (SIT, arXiv 2412.09607). The tokens represent the input only up to the tokenizer's
error, so back-projection restores what they have lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from data.layout import TokenLayout
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import DENSE_ENCODER, Models, load_models
from pipeline.own_keys import DETAIL, EXACT_ROUNDS, UpsampleRequest
from pipeline.requests import find_inputs, parse_prompts, read_plain, save_pictures, to_prompts
from stages.contract import PrefixUnsupported, Prompts
from stages.measures.pictures import sheet
from stages.measures.upsampling import back_project, blend, consistency, enlarge
from stages.prior.sampling import SamplingConfig

NUM_SHOWN = 8
"""Maximum number of inputs on the contact sheet."""


def rung_of(layout: TokenLayout, side: int, what: str) -> int:
    """Number of scales of a square image with ``side`` pixels. Raises RunError, which lists the allowed sides."""
    if (side, side) not in layout.rungs:
        sides = ", ".join(str(height) for height, _ in layout.rungs)
        raise RunError(f"{what} has {side} px; allowed: {sides}, the sizes of this tokenizer's scales")
    return layout.rungs[side, side]


def upsample_pixels(
    models: Models,
    pixels: Tensor,
    prompts: Prompts,
    settings: SamplingConfig,
    seeds: Sequence[int],
    to: int = 0,
    exact: int = EXACT_ROUNDS,
    detail: float = DETAIL,
) -> Tensor:
    """Upsample images uint8 [B, C, h, h] to [B, C, to, to], with one prompt and one seed each; ``to`` 0: full size.

    ``exact`` rounds of back-projection make the result consistent with the input. ``detail`` in [0, 1] is the weight of
    the result against bicubic interpolation.

    Raises RunError for sides that match no scale, and if ``to`` is not larger; PrefixUnsupported for a dense encoder,
    and for a ``to`` below the full size if the decoder is dense.
    """
    layout = models.tokenizer.layout
    if len(layout.rungs) < 2:
        raise PrefixUnsupported(f"upsampling needs a scale-causal encoder: {DENSE_ENCODER}")
    if pixels.shape[-1] != pixels.shape[-2]:
        raise RunError(f"an image of {pixels.shape[-1]}x{pixels.shape[-2]} px; upsampling needs square images")
    start = rung_of(layout, pixels.shape[-1], "the image")
    stop = rung_of(layout, to, "to=") if to else len(layout.scales)
    if stop <= start:
        raise RunError(f"from {pixels.shape[-1]} px to {to or layout.image_size[0]}: the result would not be larger")
    if stop < len(layout.scales) and not layout.decodes_prefixes:
        raise PrefixUnsupported(
            f"to={to}: this tokenizer's decoder needs all scales; leave to= out, or train one with "
            "tokenizer.attention=sit-sc"
        )
    if exact < 0:
        raise RunError(f"exact={exact}; allowed: 0 or more rounds")
    if not 0 <= detail <= 1:
        raise RunError(f"detail={detail:g}; allowed: 0 to 1")
    if stop < len(layout.scales) and not layout.encodes_prefixes:
        raise RunError(f"to={to}: this tokenizer decodes to the full size only; leave to= out")
    settings = dataclasses.replace(settings, scales=stop if stop < len(layout.scales) else 0)
    models.check(settings)
    tokens = models.draw(prompts, settings, seeds, prefix=models.encode(pixels), whole=range(start))
    images = models.decode(tokens)
    return blend(back_project(images, pixels, exact), pixels, detail)


def upsample_images(config: Config, request: UpsampleRequest) -> Path:
    """Write ``sheet.png`` (input, bicubic, results) and one PNG per result. Returns the path of the sheet."""
    files = find_inputs(request.input)
    models = load_models(config)
    combinations = parse_prompts(request, models.prior, every_class=False)
    rows, pictures = [], []
    repeated = [prompt for prompt in combinations for _ in range(request.count)]
    prompts = to_prompts(models, repeated)
    for number, file in enumerate(files):
        small = read_plain(file, config.images)
        seeds = [request.seed + number * len(repeated) + index for index in range(len(repeated))]
        batch = small.expand(len(repeated), -1, -1, -1)
        upsampled = upsample_pixels(
            models, batch, prompts, config.sampling, seeds, request.to, request.exact, request.detail
        )
        print(f"{file}: reduced again, the results match the input with {consistency(upsampled, batch):.1f} dB PSNR")
        parts = zip(repeated, seeds, strict=True)
        names = [f"{file.stem}-{prompt.file_name + '-' if prompt.name else ''}{seed:06d}" for prompt, seed in parts]
        save_pictures(Path(request.out), names, upsampled)
        rows.append([small, enlarge(small.unsqueeze(0), upsampled.shape[-1])[0], *upsampled])
        pictures.append(file.stem)
    path = Path(request.out) / "sheet.png"
    names = [prompt.name or f"{request.count} results" for prompt in combinations]
    columns = ["input", "bicubic", *(name if not index else "" for name in names for index in range(request.count))]
    sheet(rows[:NUM_SHOWN], pictures[:NUM_SHOWN], columns).save(path)
    print(f"wrote {path}")
    return path
