"""Upsampling of small images: bicubic baseline, post-processing and measures."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from stages.measures.distortion import psnr
from stages.measures.reconstruction import Judge, measure_distortion


def enlarge(pixels: Tensor, side: int) -> Tensor:
    """Enlarge uint8 [B, C, h, h] to [B, C, side, side] by bicubic interpolation, the baseline for upsampling."""
    large = functional.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).to(pixels.dtype)


def reduce_to(pixels: Tensor, side: int) -> Tensor:
    """Reduce uint8 [B, C, H, H] to [B, C, side, side] by averaging. Raises ValueError if ``side`` does not divide H."""
    if pixels.shape[-1] % side:
        raise ValueError(f"{pixels.shape[-1]} px cannot be averaged down to {side}; allowed: divisors of the side")
    return functional.avg_pool2d(pixels.float(), pixels.shape[-1] // side).round().to(pixels.dtype)


def back_project(made: Tensor, small: Tensor, rounds: int) -> Tensor:
    """Move uint8 images ``made`` [N, C, H, H] towards images that reduce to ``small`` [N, C, h, h].

    Iterative back-projection (Irani and Peleg 1991): each round adds the error of the reduced image, enlarged by
    bicubic interpolation. It helps because the small image is known exactly, but its tokens represent it only up to the
    tokenizer's error. Detail above the small image's resolution is unchanged.
    """
    projected, side = made.float(), made.shape[-1]
    for _ in range(rounds):
        error = small.float() - functional.avg_pool2d(projected, side // small.shape[-1])
        projected = projected + functional.interpolate(error, (side, side), mode="bicubic", align_corners=False)
    return projected.round().clamp(0, 255).to(made.dtype)


def blend(made: Tensor, small: Tensor, detail: float) -> Tensor:
    """``detail`` · ``made`` [N, C, H, H] + (1 - ``detail``) · ``enlarge(small)``, for ``small`` [N, C, h, h]; uint8.

    Image interpolation (Wang et al. 2018, ESRGAN, section 3.3): trades detail against distortion.
    """
    mixed = detail * made.float() + (1 - detail) * enlarge(small, made.shape[-1]).float()
    return mixed.round().clamp(0, 255).to(made.dtype)


def consistency(made: Tensor, small: Tensor) -> float:
    """Mean PSNR in dB of uint8 images ``made`` [N, C, H, H], reduced by averaging, against ``small`` [N, C, h, h]."""
    return float(psnr(reduce_to(made, small.shape[-1]), small).mean())


def measure_enlarged(made: Tensor, original: Tensor, small: Tensor, judge: Judge | None) -> dict[str, Any]:
    """Distortion of enlarged uint8 images ``made`` against the originals, and their consistency with ``small``."""
    measured = measure_distortion(original, made, judge, "the originals of the small images")
    return {"consistency_psnr": consistency(made, small), **measured}
