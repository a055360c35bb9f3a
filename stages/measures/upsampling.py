"""Upsampling measured: results from small images beside bicubic and beside the tokenizer's own bound."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def enlarge(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, C, h, h] enlarged to [B, C, side, side] by bicubic interpolation: what upsampling has to beat."""
    large = functional.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).to(pixels.dtype)


def reduce_to(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, C, H, H] reduced to [B, C, side, side] by averaging. Raises ValueError where side does not divide H."""
    if pixels.shape[-1] % side:
        raise ValueError(f"{pixels.shape[-1]} px cannot be averaged down to {side}")
    return functional.avg_pool2d(pixels.float(), pixels.shape[-1] // side).round().to(pixels.dtype)
