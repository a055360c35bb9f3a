"""reconstruct: images through the tokenizer and back, at its own size, or at any size where it has a head for that."""

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
    """Write one PNG an image; returns the folder. Needs no prior.

    Raises RunError for sizes and crops that are none, InputError where the tokenizer has no head for another size.
    """
    files = find_inputs(request.input)
    size, crop = parse_size(request.size), parse_crop(request.crop)
    tokenizer, _ = load_tokenizer(need(config.tokenizer.path, "tokenizer", "train-tokenizer", config))
    check_channels(tokenizer, config.images.channels)
    device, own = device_of(config), tokenizer.layout.image_size
    tokenizer.to(device)
    tokenizer.precision = resolve(config.sampling.precision, device)
    if size is not None and not tokenizer.renders:
        raise RunError(f"size={request.size}: {NO_HEAD}")
    top, left, height, width = checked_crop(size or own, crop)
    out = Path(request.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"out={out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        pixels = to_float(read_plain(file, config.images)[None])
        if tuple(pixels.shape[-2:]) != own:
            pixels = functional.interpolate(pixels, own, mode="bicubic", antialias=True).clamp(-1, 1)
        tokens = tokenizer.encode(pixels.to(device))
        if size is None:
            made = tokenizer.decode(tokens)[..., top : top + height, left : left + width]
        else:
            made = tokenizer.render(tokens, size, crop)
        pixels_to_picture(to_uint8(made[0]).cpu()).save(out / f"{file.stem}.png")
    print(f"wrote {len(files)} images to {out}")
    return out


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of e.g. 300x517 or 300; None for an empty text. Raises RunError for anything else."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip())
    if found is None:
        raise RunError(f"size={text}; allowed: height x width in pixels, e.g. 300x517, or one number for a square")
    return int(found[1]), int(found[2] or found[1])


def parse_crop(text: str) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of comma-separated numbers; None for an empty text. Raises RunError."""
    if not text:
        return None
    numbers = parse_numbers(text, "crop")
    if len(numbers) != 4:
        raise RunError(f"crop={text}; allowed: four numbers, top,left,height,width in pixels of the result")
    top, left, height, width = numbers
    return top, left, height, width
