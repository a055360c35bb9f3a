"""Upsampling measured: results from small images beside bicubic and beside the tokenizer's own bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from stages.measures.distortion import psnr
from stages.measures.reconstruction import Judge, measure_distortion


def enlarge(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, C, h, h] enlarged to [B, C, side, side] by bicubic interpolation: what upsampling has to beat."""
    large = functional.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).to(pixels.dtype)


def reduce_to(pixels: Tensor, side: int) -> Tensor:
    """uint8 [B, C, H, H] reduced to [B, C, side, side] by averaging. Raises ValueError where side does not divide H."""
    if pixels.shape[-1] % side:
        raise ValueError(f"{pixels.shape[-1]} px cannot be averaged down to {side}")
    return functional.avg_pool2d(pixels.float(), pixels.shape[-1] // side).round().to(pixels.dtype)


def back_project(made: Tensor, small: Tensor, rounds: int) -> Tensor:
    """uint8 images ``made`` [N, C, H, H] drawn to those that reduce to ``small`` [N, C, h, h] (Irani and Peleg 1991).

    Each round adds what the reduced image lacks, enlarged by bicubic interpolation: a small image is known exactly, its
    tokens only within the tokenizer's error. Detail above the small image's resolution stays as it is.
    """
    exact, side = made.float(), made.shape[-1]
    for _ in range(rounds):
        lacking = small.float() - functional.avg_pool2d(exact, side // small.shape[-1])
        exact = exact + functional.interpolate(lacking, (side, side), mode="bicubic", align_corners=False)
    return exact.round().clamp(0, 255).to(made.dtype)


def blend(made: Tensor, small: Tensor, detail: float) -> Tensor:
    """uint8 ``detail`` · ``made`` [N, C, H, H] + (1 - ``detail``) · ``small`` [N, C, h, h] enlarged by bicubic.

    Image interpolation (Wang et al. 2018, ESRGAN, section 3.3): between what is likely and what is safe.
    """
    mixed = detail * made.float() + (1 - detail) * enlarge(small, made.shape[-1]).float()
    return mixed.round().clamp(0, 255).to(made.dtype)


def consistency(made: Tensor, small: Tensor) -> float:
    """Mean PSNR in dB of uint8 images ``made`` [N, C, H, H], reduced by averaging, against ``small`` [N, C, h, h]."""
    return float(psnr(reduce_to(made, small.shape[-1]), small).mean())


def measure_enlarged(made: Tensor, original: Tensor, small: Tensor, judge: Judge | None) -> dict[str, Any]:
    """Distortion of enlarged uint8 images against the originals, and whether they still show the small ones."""
    measured = measure_distortion(original, made, judge, "the originals of the small images")
    return {"consistency_psnr": consistency(made, small), **measured}
