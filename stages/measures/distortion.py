"""Distortion in pixels: PSNR and SSIM of 8-bit images.

torchmetrics takes longer to import than torch, so it is imported only to compute SSIM; upsampling needs only PSNR.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGHEST_PSNR = 100.0
"""PSNR in dB assigned to identical images, whose PSNR is infinite."""


SMALLEST_SSIM = 11
"""Side in pixels of SSIM's window."""


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, float64 [B], in squared gray levels, of uint8 [B, C, H, W]."""
    return (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))


def decibels(error: Tensor) -> Tensor:
    """PSNR in dB from mean squared errors in squared gray levels (peak 255), at most 100."""
    return (10 * torch.log10(255**2 / error.clamp(min=1e-9))).clamp(max=HIGHEST_PSNR)


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 [B], of uint8 [B, C, H, W]."""
    return decibels(mean_squared_error(prediction, target))


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, float32 [B], of uint8 [B, C, H, W]; 1 is best.

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5. Raises ValueError for sides under 11.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(prediction.shape[-2:]) < SMALLEST_SSIM:
        raise ValueError(f"images have {tuple(prediction.shape[-2:])} px; allowed for SSIM's window: 11 or more")
    values = structural_similarity_index_measure(
        prediction.float(), target.float(), data_range=255.0, sigma=1.5, kernel_size=SMALLEST_SSIM, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(prediction))
