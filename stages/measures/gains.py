"""What each token of a nested code adds: PSNR against the images by the number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.images.views import to_uint8
from data.layout import Tokens
from stages.contract import Tokenizer
from stages.measures.distortion import psnr


@torch.inference_mode()
def measure_gains(
    tokenizer: Tokenizer, pixels: Tensor, tokens: Tokens, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Mean PSNR against uint8 ``pixels`` [N, C, H, W] of every prefix of scales, and what each one adds, in dB.

    The first one adds to a flat image of the pixels' mean. ``not_above_zero`` counts those that add nothing.
    """
    mean = pixels.double().mean((0, 2, 3)).round().to(torch.uint8)[:, None, None]
    found = [float(psnr(mean.expand_as(pixels), pixels).mean())]
    for number in range(1, len(tokenizer.layout.scales) + 1):
        values = []
        for images, part in zip(pixels.split(batch_size), tokens.split(batch_size), strict=True):
            decoded = tokenizer.decode(tokenizer.first_scales(part, number).to(device))
            values.append(psnr(to_uint8(decoded).cpu(), images))
        found.append(float(torch.cat(values).mean()))
    gains = [after - before for before, after in zip(found, found[1:], strict=False)]
    return {
        "num_images": len(pixels),
        "psnr_of_mean": found[0],
        "psnr": found[1:],
        "gain": gains,
        "not_above_zero": sum(gain <= 0 for gain in gains),
    }
