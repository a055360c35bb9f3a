"""PSNR against the images by the number of tokens of a nested code, and the gain of each token."""

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
    """Mean PSNR in dB of every prefix of scales against uint8 ``pixels`` [N, C, H, W], and the gain of each scale.

    The gain of the first scale is relative to a flat image of the mean color. ``not_above_zero`` counts the scales
    whose gain is 0 or less.
    """
    mean = pixels.double().mean((0, 2, 3)).round().to(torch.uint8)[:, None, None]
    mean_psnrs = [float(psnr(mean.expand_as(pixels), pixels).mean())]
    for number in range(1, len(tokenizer.layout.scales) + 1):
        values = []
        for images, part in zip(pixels.split(batch_size), tokens.split(batch_size), strict=True):
            decoded = tokenizer.decode(tokenizer.first_scales(part, number).to(device))
            values.append(psnr(to_uint8(decoded).cpu(), images))
        mean_psnrs.append(float(torch.cat(values).mean()))
    gains = [after - before for before, after in zip(mean_psnrs, mean_psnrs[1:], strict=False)]
    return {
        "num_images": len(pixels),
        "psnr_of_mean": mean_psnrs[0],
        "psnr": mean_psnrs[1:],
        "gain": gains,
        "not_above_zero": sum(gain <= 0 for gain in gains),
    }
