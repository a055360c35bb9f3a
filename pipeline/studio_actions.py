"""Actions of the studio: from the values of the controls to images. This module is independent of the browser.

Notes:

- All values are checked again, because requests can bypass the limits of the page.
- Uploads are checked by their header, so an image that is too large is rejected before it is decoded.
- Samples are kept decoded at every number of scales, so that viewing these needs no sampling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data.images.source import decode
from data.images.views import view_pixels
from data.layout import TokenLayout
from pipeline.config import Config
from pipeline.edit import edit_pixels
from pipeline.errors import RunError
from pipeline.models import Models
from pipeline.requests import Asked, known_classes, read_plain, to_prompts
from pipeline.upsample import rung_of, upsample_pixels
from stages.contract import Prior
from stages.measures.upsampling import consistency, enlarge
from stages.prior.sampling import SamplingConfig

MAX_COUNT = 16
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 20.0
MAX_TEMPERATURE = 5.0
MAX_CAPTION = 10_000
"""Characters; text encoders cut much earlier."""
MAX_SIDE = 4096
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

Tell = Callable[[float], None]
"""Called with the progress of sampling, from 0 to 1."""


@dataclass(frozen=True)
class Studio:
    """A run and its models."""

    config: Config
    models: Models


@dataclass(frozen=True)
class Wish:
    """Values of the controls that all tabs share, not yet checked."""

    label: int = -1
    """-1 for no class."""
    text: str = ""
    """Empty for no caption."""
    count: int = 4
    guidance: float = 1.0
    temperature: float = 1.0
    """For all scales; a factor if the config has one temperature per scale."""
    seed: int = 0
    """Image i is sampled with seed + i."""


class Shown(NamedTuple):
    """An image with its caption."""

    pixels: Tensor
    """uint8 [C, h, w]"""
    caption: str
    name: str
    """File name for saving, without extension."""


@dataclass(frozen=True)
class Drawn:
    """Sampled images, also decoded from only their first scales."""

    steps: tuple[tuple[int, Tensor], ...]
    """(number of scales, uint8 [N, C, h, w]), from coarse to fine; one entry if the decoder needs all scales."""
    asked: Asked
    seeds: tuple[int, ...]

    def shown(self, step: int) -> list[Shown]:
        """Images of one step, counted from 0."""
        pictures = self.steps[step][1]
        return [_result(self.asked, seed, picture) for seed, picture in zip(self.seeds, pictures, strict=True)]


def shown_prefixes(layout: TokenLayout, reached: int) -> list[int]:
    """Numbers of scales at which new images are shown; the last one is ``reached``."""
    return [*(number for number in layout.prefixes if number < reached), reached]


def draw_samples(studio: Studio, wish: Wish, tell: Tell) -> Drawn:
    """Sample images, equal to those of ``octaves sample`` with this seed. Raises RunError for values out of range."""
    models, layout = studio.models, studio.models.prior.layout
    prompt, settings = check_wish(studio, wish)
    seeds = tuple(wish.seed + index for index in range(wish.count))
    models.check(settings)
    length = min(layout.prefix_length(settings.scales or len(layout.scales)), models.prior.max_length)
    prompts = to_prompts(models, [prompt] * wish.count)
    tokens = watched(models, length, wish.count, tell).draw(prompts, settings, seeds)
    reached = settings.scales or len(layout.scales)
    scale_counts = shown_prefixes(layout, reached) if layout.decodes_prefixes else [reached]
    steps = tuple((k, models.decode(models.tokenizer.first_scales(tokens, k))) for k in scale_counts)
    return Drawn(steps, prompt, seeds)


def upsample_upload(
    studio: Studio, path: str | None, start: int, stop: int, wish: Wish, tell: Tell
) -> tuple[list[Shown], str]:
    """Reduce an upload to ``start`` px and upsample it to ``stop`` px.

    Returns (input, bicubic interpolation and candidates; a line about them). Raises RunError, CorruptImage, or
    PrefixUnsupported if the encoder sees all scales at once.
    """
    models = studio.models
    prompt, settings = check_wish(studio, wish)
    layout = models.tokenizer.layout
    first, last = rung_of(layout, start, "from"), rung_of(layout, stop, "to")
    upload = middle_square(read_plain(check_upload(path), studio.config.images))
    small = reduce_by_averaging(upload, start)
    seeds = [wish.seed + index for index in range(wish.count)]
    prompts = to_prompts(models, [prompt] * wish.count)
    length = layout.prefix_length(last) - layout.prefix_length(first)
    batch = small.expand(wish.count, -1, -1, -1)
    upsampled = upsample_pixels(watched(models, length, wish.count, tell), batch, prompts, settings, seeds, stop)
    shown = [
        Shown(small, f"input, {start} px", "input"),
        Shown(enlarge(small.unsqueeze(0), stop)[0], "bicubic", "bicubic"),
        *(_result(prompt, seed, picture) for seed, picture in zip(seeds, upsampled, strict=True)),
    ]
    if upload.shape[-1] > stop:
        shown.insert(2, Shown(reduce_by_averaging(upload, stop), f"the upload at {stop} px", "upload"))
    agreement = consistency(upsampled, batch)
    return shown, f"Reduced again to {start} px, the candidates match the input with {agreement:.1f} dB PSNR."


def edit_upload(studio: Studio, path: str | None, frozen: int, mask: str, wish: Wish, tell: Tell) -> list[Shown]:
    """Crop an upload like the run's images and edit it. Returns the original, its reconstruction and edited images.

    ``mask`` has the format of ``mask_pixels``. Raises RunError, CorruptImage, or PrefixUnsupported.
    """
    models = studio.models
    prompt, settings = check_wish(studio, wish)
    layout = models.tokenizer.layout
    original = seen_upload(studio, path)
    open_pixels = mask_pixels(mask, mask_cells(studio), original.shape[-1])
    seeds = [wish.seed + index for index in range(wish.count)]
    prompts = to_prompts(models, [prompt] * wish.count)
    length = layout.length - layout.prefix_length(min(max(0, frozen), len(layout.scales)))
    batch = original.expand(wish.count, -1, -1, -1)
    edited = edit_pixels(
        watched(models, length, wish.count, tell), batch, frozen, prompts, settings, seeds, open_pixels
    )
    return [
        Shown(original, "original", "original"),
        Shown(models.decode(models.encode(original.unsqueeze(0)))[0], "decoded", "decoded"),
        *(_result(prompt, seed, picture) for seed, picture in zip(seeds, edited, strict=True)),
    ]


def check_wish(studio: Studio, wish: Wish) -> tuple[Asked, SamplingConfig]:
    """Prompt and sampling settings of a request. Raises RunError for a value out of range."""
    names, base = known_classes(studio.models.prior), studio.config.sampling
    if not -1 <= wish.label < len(names):
        raise RunError(f"class {wish.label}; allowed: -1 (none) to {len(names) - 1}")
    if len(wish.text) > MAX_CAPTION:
        raise RunError(f"a caption of {len(wish.text)} characters; allowed: up to {MAX_CAPTION}")
    for name, value, low, high in (
        ("images", wish.count, 1, MAX_COUNT),
        ("guidance", wish.guidance, 0, MAX_GUIDANCE),
        ("temperature", wish.temperature, 0, MAX_TEMPERATURE),
        ("seed", wish.seed, 0, MAX_SEED),
    ):
        if not low <= value <= high:  # also rejects NaN, which compares as false
            raise RunError(f"{name}={value}; allowed: {low} to {high:g}")
    per_scale = len(base.temperature) > 1
    temperature = [value * wish.temperature for value in base.temperature] if per_scale else [wish.temperature]
    settings = dataclasses.replace(base, guidance=wish.guidance, temperature=temperature)
    return Asked.of(wish.label, wish.text, names), settings


def read_wish(label: Any, text: Any, count: Any, guidance: Any, temperature: Any, seed: Any) -> Wish:
    """Make a ``Wish`` of the raw values of a page. Raises RunError for missing values and for values of wrong type."""
    numbers = {"class": label, "images": count, "guidance": guidance, "temperature": temperature, "seed": seed}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RunError(f"{name}: a number is missing")
    for name, value in (("class", label), ("images", count), ("seed", seed)):
        if value != int(value):
            raise RunError(f"{name}={value}; allowed: integers")
    return Wish(int(label), str(text or "").strip(), int(count), float(guidance), float(temperature), int(seed))


def check_upload(path: str | None) -> Path:
    """Path of an upload, checked by its header only. Raises RunError."""
    if not path:
        raise RunError("no image: upload one first")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except Exception as error:  # decoders can raise almost any error for invalid data
        raise RunError(f"this file cannot be read as an image; allowed: {', '.join(FORMATS)}") from error
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RunError(
            f"an image of {width} x {height} pixels; allowed: {MAX_SIDE} per side and {MAX_PIXELS // 10**6} million "
            "in total; reduce it first"
        )
    return Path(path)


def seen_upload(studio: Studio, path: str | None) -> Tensor:
    """An upload as uint8 [C, size, size], cropped and resized like the run's images. Raises RunError, CorruptImage."""
    images = studio.config.images
    return view_pixels(decode(check_upload(path), "the upload"), images, images.eval_view)


def middle_square(pixels: Tensor) -> Tensor:
    """The largest center square [C, s, s] of [C, h, w]."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def reduce_by_averaging(pixels: Tensor, side: int) -> Tensor:
    """Reduce uint8 [C, s, s] to [C, side, side]. Raises RunError for an image that is already smaller."""
    if pixels.shape[-1] < side:
        raise RunError(f"an image of {pixels.shape[-1]} px; allowed: {side} px or more, or choose another size")
    return functional.adaptive_avg_pool2d(pixels.float(), side).round().to(torch.uint8)


def mask_cells(studio: Studio) -> int:
    """Cells per side of the grid on which a mask is painted: the finest grid of tokens; 0 if tokens have no grid."""
    grids = [scale.grid for scale in studio.models.tokenizer.layout.scales]
    return 0 if None in grids else max(max(grid) for grid in grids if grid)


def mask_pixels(mask: str, cells: int, size: int) -> Tensor | None:
    """Convert a mask of ``cells`` x ``cells`` characters 0 or 1, in rows, to bool [size, size]; None if it is empty.

    Raises RunError for anything else.
    """
    if not mask:
        return None
    if len(mask) != cells * cells or set(mask) - {"0", "1"}:
        raise RunError(f"a mask of {len(mask)} characters; allowed: {cells * cells} times 0 or 1")
    grid = torch.tensor([letter == "1" for letter in mask], dtype=torch.float32).view(1, 1, cells, cells)
    return functional.interpolate(grid, (size, size), mode="nearest")[0, 0] > 0 if grid.any() else None


def watched(models: Models, length: int, count: int, tell: Tell) -> Models:
    """Models that report how much of ``count`` sequences of ``length`` elements is sampled."""
    batches = math.ceil(count / models.batch_size)
    return dataclasses.replace(models, prior=cast(Prior, _Watched(models.prior, length * batches, tell)))


class _Watched:
    """A prior that reports progress; the sampler calls ``advance`` once per element, or once per scale."""

    def __init__(self, prior: Prior, total: int, tell: Tell) -> None:
        self._prior, self._total, self._tell = prior, total, tell
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)

    def advance(self, state: Any, element: Tensor) -> None:
        self._prior.advance(state, element)
        self._done += element.shape[1] if element.dim() == 3 else 1
        self._tell(min(1.0, self._done / self._total))


def _result(prompt: Asked, seed: int, picture: Tensor) -> Shown:
    return Shown(picture, f"seed {seed}", f"{prompt.file_name}-{seed:06d}")
