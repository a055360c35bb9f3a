"""reconstruct: encode and decode images, at the tokenizer's size or, with a head, at any size."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.nn import functional

from data.images.views import pixels_to_picture, to_float, to_uint8
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.models import check_channels
from pipeline.own_keys import ReconstructRequest
from pipeline.placement import device_of
from pipeline.requests import find_inputs, parse_numbers, read_plain
from pipeline.run import need
from stages.precision import resolve
from stages.tokenizer.heads import NO_HEAD, checked_crop
from stages.weights import load_tokenizer


@torch.inference_mode()
def reconstruct_images(config: Config, request: ReconstructRequest) -> Path:
    """Write one PNG per image. Returns the folder. Needs no prior.

    Raises RunError for an invalid size or crop, or for another size without a head.
    """
    files = find_inputs(request.input)
    size, crop = parse_size(request.size), parse_crop(request.crop)
    tokenizer, _ = load_tokenizer(need(config.tokenizer.path, "tokenizer", "train-tokenizer", config))
    check_channels(tokenizer, config.images.channels)
    device, own_size = device_of(config), tokenizer.layout.image_size
    tokenizer.to(device)
    tokenizer.precision = resolve(config.sampling.precision, device)
    if size is not None and not tokenizer.renders:
        raise RunError(f"size={request.size}: {NO_HEAD}")
    top, left, height, width = checked_crop(size or own_size, crop)
    out = Path(request.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"out={out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        pixels = to_float(read_plain(file, config.images)[None])
        if tuple(pixels.shape[-2:]) != own_size:
            pixels = functional.interpolate(pixels, own_size, mode="bicubic", antialias=True).clamp(-1, 1)
        tokens = tokenizer.encode(pixels.to(device))
        if size is None:
            reconstruction = tokenizer.decode(tokens)[..., top : top + height, left : left + width]
        else:
            reconstruction = tokenizer.render(tokens, size, crop)
        pixels_to_picture(to_uint8(reconstruction[0]).cpu()).save(out / f"{file.stem}.png")
    print(f"wrote {len(files)} images to {out}")
    return out


def parse_size(text: str) -> tuple[int, int] | None:
    """Parse (height, width) from e.g. 300x517 or 300; None for an empty text. Raises RunError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip())
    if match is None:
        raise RunError(f"size={text}; allowed: height x width in pixels, e.g. 300x517, or one number for a square")
    return int(match[1]), int(match[2] or match[1])


def parse_crop(text: str) -> tuple[int, int, int, int] | None:
    """Parse (top, left, height, width) from comma-separated numbers; None for an empty text. Raises RunError."""
    if not text:
        return None
    numbers = parse_numbers(text, "crop")
    if len(numbers) != 4:
        raise RunError(f"crop={text}; allowed: four numbers, top,left,height,width in pixels of the result")
    top, left, height, width = numbers
    return top, left, height, width
