"""What the studio's buttons do: from the values of a page's controls to pictures. Nothing here knows of a browser.

What is notable here:

- every value is checked again, for a page's limits hold only for those who use the page;
- an upload is judged by its header, so a picture that is too large is refused before a pixel of it is decoded;
- a draw keeps what every number of scales decodes to, so looking at them costs no sampling.
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
"""Letters; an encoder cuts far earlier."""
MAX_SIDE = 4096
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

Tell = Callable[[float], None]
"""Is told how much of a draw is done, 0 to 1."""


@dataclass(frozen=True)
class Studio:
    """A run that a page shows."""

    config: Config
    models: Models


@dataclass(frozen=True)
class Wish:
    """The controls that all tabs share; values as they come from outside."""

    label: int = -1
    """-1 for no class."""
    text: str = ""
    """Empty for no caption."""
    count: int = 4
    guidance: float = 1.0
    temperature: float = 1.0
    """For all scales; where the config has one for each, a factor to them."""
    seed: int = 0
    """Picture i is drawn with seed + i."""


class Shown(NamedTuple):
    """A picture with what stands under it."""

    pixels: Tensor
    """uint8 [C, h, w]"""
    caption: str
    name: str
    """Of the file that it is saved as, without an ending."""


@dataclass(frozen=True)
class Drawn:
    """New images, and what their first scales decode to."""

    steps: tuple[tuple[int, Tensor], ...]
    """(number of scales, uint8 [N, C, h, w]), from coarse to fine; one step where the decoder needs all scales."""
    asked: Asked
    seeds: tuple[int, ...]

    def shown(self, step: int) -> list[Shown]:
        """The pictures of one of the steps, counted from 0."""
        pictures = self.steps[step][1]
        return [_result(self.asked, seed, picture) for seed, picture in zip(self.seeds, pictures, strict=True)]


def shown_prefixes(layout: TokenLayout, reached: int) -> list[int]:
    """Numbers of scales at which new pictures are shown, the last one ``reached``."""
    return [*(number for number in layout.prefixes if number < reached), reached]


def draw_samples(studio: Studio, wish: Wish, tell: Tell) -> Drawn:
    """New images, the same as ``octaves sample`` gives for the seed. Raises RunError for a wish out of range."""
    models, layout = studio.models, studio.models.prior.layout
    asked, settings = check_wish(studio, wish)
    seeds = tuple(wish.seed + index for index in range(wish.count))
    models.check(settings)
    length = min(layout.prefix_length(settings.scales or len(layout.scales)), models.prior.max_length)
    prompts = to_prompts(models, [asked] * wish.count)
    tokens = watched(models, length, wish.count, tell).draw(prompts, settings, seeds)
    reached = settings.scales or len(layout.scales)
    wanted = shown_prefixes(layout, reached) if layout.decodes_prefixes else [reached]
    steps = tuple((k, models.decode(models.tokenizer.first_scales(tokens, k))) for k in wanted)
    return Drawn(steps, asked, seeds)


def upsample_upload(
    studio: Studio, path: str | None, start: int, stop: int, wish: Wish, tell: Tell
) -> tuple[list[Shown], str]:
    """(input, bicubic and candidates; a line about them) for an upload, reduced to ``start`` px, enlarged to ``stop``.

    Raises RunError, CorruptImage, or PrefixUnsupported where the encoder sees all scales at once.
    """
    models = studio.models
    asked, settings = check_wish(studio, wish)
    layout = models.tokenizer.layout
    first, last = rung_of(layout, start, "from"), rung_of(layout, stop, "to")
    upload = middle_square(read_plain(check_upload(path), studio.config.images))
    small = reduce_by_averaging(upload, start)
    seeds = [wish.seed + index for index in range(wish.count)]
    prompts = to_prompts(models, [asked] * wish.count)
    length = layout.prefix_length(last) - layout.prefix_length(first)
    many = small.expand(wish.count, -1, -1, -1)
    made = upsample_pixels(watched(models, length, wish.count, tell), many, prompts, settings, seeds, stop)
    shown = [
        Shown(small, f"input, {start} px", "input"),
        Shown(enlarge(small.unsqueeze(0), stop)[0], "bicubic", "bicubic"),
        *(_result(asked, seed, picture) for seed, picture in zip(seeds, made, strict=True)),
    ]
    if upload.shape[-1] > stop:
        shown.insert(2, Shown(reduce_by_averaging(upload, stop), f"the upload at {stop} px", "upload"))
    agreement = consistency(made, many)
    return shown, f"Reduced again to {start} px, the candidates agree with the input at {agreement:.1f} dB."


def edit_upload(studio: Studio, path: str | None, frozen: int, mask: str, wish: Wish, tell: Tell) -> list[Shown]:
    """The original, its decoded tokens and edited images, for an upload cut like the run's own images.

    ``mask`` is as ``mask_pixels`` takes it. Raises RunError, CorruptImage, or PrefixUnsupported.
    """
    models = studio.models
    asked, settings = check_wish(studio, wish)
    layout = models.tokenizer.layout
    original = seen_upload(studio, path)
    open_pixels = mask_pixels(mask, mask_cells(studio), original.shape[-1])
    seeds = [wish.seed + index for index in range(wish.count)]
    prompts = to_prompts(models, [asked] * wish.count)
    length = layout.length - layout.prefix_length(min(max(0, frozen), len(layout.scales)))
    many = original.expand(wish.count, -1, -1, -1)
    made = edit_pixels(watched(models, length, wish.count, tell), many, frozen, prompts, settings, seeds, open_pixels)
    return [
        Shown(original, "original", "original"),
        Shown(models.decode(models.encode(original.unsqueeze(0)))[0], "decoded", "decoded"),
        *(_result(asked, seed, picture) for seed, picture in zip(seeds, made, strict=True)),
    ]


def check_wish(studio: Studio, wish: Wish) -> tuple[Asked, SamplingConfig]:
    """The prompt in plain words and the settings of a wish. Raises RunError for a value out of range."""
    names, base = known_classes(studio.models.prior), studio.config.sampling
    if not -1 <= wish.label < len(names):
        raise RunError(f"class {wish.label}; allowed: -1 (none) to {len(names) - 1}")
    if len(wish.text) > MAX_CAPTION:
        raise RunError(f"a caption of {len(wish.text)} letters; allowed: up to {MAX_CAPTION}")
    for name, value, low, high in (
        ("images", wish.count, 1, MAX_COUNT),
        ("guidance", wish.guidance, 0, MAX_GUIDANCE),
        ("temperature", wish.temperature, 0, MAX_TEMPERATURE),
        ("seed", wish.seed, 0, MAX_SEED),
    ):
        if not low <= value <= high:  # not a number is refused, too: it compares as false
            raise RunError(f"{name}={value}; allowed: {low} to {high:g}")
    per_scale = len(base.temperature) > 1
    temperature = [value * wish.temperature for value in base.temperature] if per_scale else [wish.temperature]
    settings = dataclasses.replace(base, guidance=wish.guidance, temperature=temperature)
    return Asked.of(wish.label, wish.text, names), settings


def read_wish(label: Any, text: Any, count: Any, guidance: Any, temperature: Any, seed: Any) -> Wish:
    """A wish from a page's raw values. Raises RunError for a missing one, or one that is no number."""
    numbers = {"class": label, "images": count, "guidance": guidance, "temperature": temperature, "seed": seed}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RunError(f"{name}: a number is missing")
    for name, value in (("class", label), ("images", count), ("seed", seed)):
        if value != int(value):
            raise RunError(f"{name}={value}; allowed: whole numbers")
    return Wish(int(label), str(text or "").strip(), int(count), float(guidance), float(temperature), int(seed))


def check_upload(path: str | None) -> Path:
    """The path of an upload that may be decoded, judged by its header alone. Raises RunError."""
    if not path:
        raise RunError("no picture yet: upload one first")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except Exception as error:  # foreign bytes make decoders raise nearly anything
        raise RunError(f"this file is no picture that can be read; allowed: {', '.join(FORMATS)}") from error
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RunError(
            f"a picture of {width} x {height} pixels; allowed: {MAX_SIDE} a side and {MAX_PIXELS // 10**6} million "
            "in all; reduce it first"
        )
    return Path(path)


def seen_upload(studio: Studio, path: str | None) -> Tensor:
    """uint8 [C, size, size]: an upload, cut and resized like the run's own images. Raises RunError, CorruptImage."""
    images = studio.config.images
    return view_pixels(decode(check_upload(path), "the upload"), images, images.eval_view)


def middle_square(pixels: Tensor) -> Tensor:
    """The largest middle square [C, s, s] of [C, h, w]."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def reduce_by_averaging(pixels: Tensor, side: int) -> Tensor:
    """uint8 [C, s, s] reduced to [C, side, side]. Raises RunError for a picture that is smaller already."""
    if pixels.shape[-1] < side:
        raise RunError(f"a picture of {pixels.shape[-1]} px; allowed: {side} px or more, or choose another size")
    return functional.adaptive_avg_pool2d(pixels.float(), side).round().to(torch.uint8)


def mask_cells(studio: Studio) -> int:
    """Cells a side of the grid on which a mask is painted: the finest grid of tokens; 0 where tokens have no place."""
    grids = [scale.grid for scale in studio.models.tokenizer.layout.scales]
    return 0 if None in grids else max(max(grid) for grid in grids if grid)


def mask_pixels(mask: str, cells: int, size: int) -> Tensor | None:
    """bool [size, size] from a mask of ``cells`` x ``cells`` letters 0 or 1 in rows; None for an empty one.

    Raises RunError for anything else.
    """
    if not mask:
        return None
    if len(mask) != cells * cells or set(mask) - {"0", "1"}:
        raise RunError(f"a mask of {len(mask)} letters; allowed: {cells * cells} times 0 or 1")
    grid = torch.tensor([letter == "1" for letter in mask], dtype=torch.float32).view(1, 1, cells, cells)
    return functional.interpolate(grid, (size, size), mode="nearest")[0, 0] > 0 if grid.any() else None


def watched(models: Models, length: int, count: int, tell: Tell) -> Models:
    """The same models, which tell how much of ``count`` sequences of ``length`` elements is done."""
    batches = math.ceil(count / models.batch_size)
    return dataclasses.replace(models, prior=cast(Prior, _Watched(models.prior, length * batches, tell)))


class _Watched:
    """A prior that tells of each element; the sampling engine calls ``advance`` once for each, or for each scale."""

    def __init__(self, prior: Prior, total: int, tell: Tell) -> None:
        self._prior, self._total, self._tell = prior, total, tell
        self._done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)

    def advance(self, state: Any, element: Tensor) -> None:
        self._prior.advance(state, element)
        self._done += element.shape[1] if element.dim() == 3 else 1
        self._tell(min(1.0, self._done / self._total))


def _result(asked: Asked, seed: int, picture: Tensor) -> Shown:
    return Shown(picture, f"seed {seed}", f"{asked.file_name}-{seed:06d}")
