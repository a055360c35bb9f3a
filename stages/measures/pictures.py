"""Sheets of small images in labeled rows, enlarged so that single pixels are visible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 96
GAP = 4
FONT_SIZE = 13
# gray is legible on white and on black; the sheet itself is transparent
INK = (128, 128, 128, 255)


def cell_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a cell: the smallest integer multiple of the image size whose longer side is 96 px or more."""
    factor = max(1, math.ceil(SMALLEST_CELL / max(height, width)))
    return height * factor, width * factor


def to_picture(pixels: Tensor, cell: tuple[int, int]) -> Image.Image:
    """RGB picture of size ``cell`` (height, width) from uint8 [1 or 3, h, w], with nearest-neighbor interpolation."""
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array).resize((cell[1], cell[0]), Image.Resampling.NEAREST)


def sheet(
    rows: Sequence[Sequence[Tensor] | Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Transparent RGBA sheet of rows of images uint8 [C, h, w]; smaller images are enlarged to the largest cell.

    Labels are truncated to 40 characters, as captions can be long. Raises ValueError if there are no images.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("got 0 images; a sheet needs at least one")
    row_labels, column_labels = [list(map(shortened, labels)) for labels in (row_labels, column_labels)]
    height, width = cell_size(*max((tuple(image.shape[-2:]) for image in images), key=math.prod))
    font = ImageFont.load_default(size=FONT_SIZE)
    left = math.ceil(max((font.getlength(label) for label in row_labels), default=-2 * GAP)) + 2 * GAP
    top = FONT_SIZE + 2 * GAP if column_labels else 0
    columns = max(len(row) for row in rows)
    picture = Image.new("RGBA", (left + columns * (width + GAP) - GAP, top + len(rows) * (height + GAP) - GAP))
    draw = ImageDraw.Draw(picture)
    for x, label in enumerate(column_labels):
        draw.text((left + x * (width + GAP) + width / 2, top / 2), label, INK, font, anchor="mm")
    for y, row in enumerate(rows):
        upper = top + y * (height + GAP)
        if row_labels:
            draw.text((left - 2 * GAP, upper + height / 2), row_labels[y], INK, font, anchor="rm")
        for x, image in enumerate(row):
            picture.paste(to_picture(image, (height, width)), (left + x * (width + GAP), upper))
    return picture


def shortened(text: str, letters: int = 40) -> str:
    """Shorten a caption to a label: one line of at most ``letters`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 1] + "…"


def error_picture(prediction: Tensor, target: Tensor, gain: float = 4) -> Tensor:
    """|prediction - target| · ``gain`` as uint8 of the same shape; black where they agree."""
    difference = (prediction.float() - target.float()).abs() * gain
    return difference.clamp(0, 255).round().to(torch.uint8)
