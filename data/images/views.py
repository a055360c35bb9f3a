"""Views: from a stored image to pixels, uint8 [C, size, size].

Notes:

- Crop and resize are one step: the source region is resampled directly to the output, with antialiasing. So a
  10,000 x 10 image never becomes a huge intermediate image.
- The flip comes last, so flipping a view equals the view with ``flip``.
- Random views use a generator seeded by (seed, epoch, index), so they do not depend on the number of workers or
  processes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.source import ImagesError

DETERMINISTIC_VIEWS = ("center", "pad")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8, rounded and clamped. The exact inverse of ``to_float``."""
    return ((pixels.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture_to_pixels(picture: Image.Image) -> Tensor:
    """uint8 [C, h, w] from a picture with 8 bits per channel, such as modes L and RGB."""
    array = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, len(picture.getbands()))
    return torch.from_numpy(array).permute(2, 0, 1)


def pixels_to_picture(pixels: Tensor) -> Image.Image:
    """A picture of mode L or RGB from uint8 [1 or 3, h, w] on the CPU."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def generator_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one image in one epoch."""
    return np.random.default_rng([seed, epoch, index])


def plain_image(image: Image.Image | np.ndarray, channels: int, background: list[int]) -> Image.Image:
    """An upright image of mode L or RGB from any PIL mode or a uint8 array.

    Transparent pixels are composited over ``background`` (RGB). 16-bit gray is scaled to 8 bits.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow reads 16-bit gray as modes I;16* and, from some files, as I. Converting to L would clip, not scale.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def smaller_side(image: Image.Image | np.ndarray) -> int:
    """The smaller side in pixels of a stored image."""
    return min(image.shape[:2] if isinstance(image, np.ndarray) else image.size)


def view_pixels(
    image: Image.Image | np.ndarray,
    config: ImagesConfig,
    view: str,
    flip: bool = False,
    generator: np.random.Generator | None = None,
) -> Tensor:
    """One view of an image: uint8 [channels, size, size].

    ``center`` resizes the largest centered square. ``random_resized_crop`` resizes a square at a random place, whose
    area is a random fraction (``crop_scale``) of the largest square; it keeps the aspect ratio. ``random_crop`` crops
    without resizing. ``pad`` adds a black border. Random views need ``generator``.

    Raises ImagesError for an image too small for ``random_crop`` or too large for ``pad``, and for an unknown view.
    """
    plain = plain_image(image, config.channels, config.background)
    size = config.size
    width, height = plain.size
    if view == "center":
        side: float = min(width, height)
        plain = resized_square(plain, (width - side) / 2, (height - side) / 2, side, size)
    elif view == "random_resized_crop":
        assert generator is not None, "random_resized_crop needs a generator"
        low, high = config.crop_scale
        side = min(width, height) * math.sqrt(generator.uniform(low, high))
        left, top = generator.uniform(0, 1, 2) * (width - side, height - side)
        plain = resized_square(plain, left, top, side, size)
    elif view == "random_crop":
        assert generator is not None, "random_crop needs a generator"
        if min(width, height) < size:
            raise ImagesError(
                f"an image of {width} x {height} is too small for a crop of {size} x {size}; "
                "use images.train_view=center or random_resized_crop, which resize"
            )
        x, y = (int(generator.integers(0, room + 1)) for room in (width - size, height - size))
        plain = plain.crop((x, y, x + size, y + size))
    elif view == "pad":
        if max(width, height) > size:
            raise ImagesError(
                f"an image of {width} x {height} does not fit into {size} x {size}; the view pad never resizes: "
                f"use center, or images.size={max(width, height)} or more"
            )
        framed = Image.new(plain.mode, (size, size))
        framed.paste(plain, ((size - width) // 2, (size - height) // 2))
        plain = framed
    else:
        raise ImagesError(f"unknown view {view!r}; allowed: center, random_resized_crop, random_crop, pad")
    pixels = picture_to_pixels(plain)
    return (pixels.flip(-1) if flip else pixels).contiguous()


def resized_square(image: Image.Image, left: float, top: float, side: float, size: int) -> Image.Image:
    """The square with side ``side`` at (left, top), in fractional pixels, resampled to ``size`` x ``size``."""
    width, height = image.size
    if side == size:
        # Same scale: a crop of whole pixels is exact, a shift by half a pixel would blur.
        left, top = math.floor(left), math.floor(top)
    box = (left, top, min(left + side, width), min(top + side, height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def flips(seed: int, epoch: int, index: int) -> bool:
    """True if the training view of an image is mirrored in this epoch. Used if ``config.flip`` is set."""
    return bool(generator_for(seed, epoch, index).integers(2))


def train_pixels(image: Image.Image | np.ndarray, config: ImagesConfig, seed: int, epoch: int, index: int) -> Tensor:
    """The training view of one image in one epoch: uint8 [channels, size, size]. Raises errors of ``view_pixels``."""
    flip = config.flip and flips(seed, epoch, index)
    return view_pixels(image, config, config.train_view, flip, generator_for(seed, epoch, index))
