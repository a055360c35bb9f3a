"""Conversion between RGB and YCbCr as in JPEG (ITU-T T.871), but with chroma around 0, so black is 0 in every plane."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_RED, _BLUE = 0.299, 0.114
_FORWARD = np.array(
    [
        [_RED, 1 - _RED - _BLUE, _BLUE],
        [-_RED / (2 - 2 * _BLUE), -(1 - _RED - _BLUE) / (2 - 2 * _BLUE), 0.5],
        [0.5, -(1 - _RED - _BLUE) / (2 - 2 * _RED), -_BLUE / (2 - 2 * _RED)],
    ]
)
_INVERSE = np.linalg.inv(_FORWARD)


def to_ycbcr(pixels: np.ndarray) -> np.ndarray:
    """Y, Cb, Cr float64 [N, 3, H, W] of RGB [N, 3, H, W]; RGB in [0, 1] gives Y in [0, 1], Cb and Cr in [-1/2, 1/2]."""
    return np.einsum("ij,njhw->nihw", _FORWARD, pixels)


def to_rgb(planes: np.ndarray) -> np.ndarray:
    """The inverse of ``to_ycbcr``."""
    return np.einsum("ij,njhw->nihw", _INVERSE, planes)


def chroma_of(pixels: Tensor) -> Tensor:
    """Cb and Cr float64 [N, 2, H, W], in 8-bit steps around 0, of uint8 images [N, 3, H, W]."""
    return torch.from_numpy(to_ycbcr(pixels.double().numpy()))[:, 1:]


def luma_of(pixels: Tensor) -> Tensor:
    """Y uint8 [N, 1, H, W] of uint8 images [N, 3, H, W]."""
    return torch.from_numpy(to_ycbcr(pixels.double().numpy()))[:, :1].round().clamp(0, 255).to(torch.uint8)


def with_chroma(gray: Tensor, chroma: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] from luma uint8 [N, 1, H, W] and Cb, Cr float64 [N, 2, H, W]."""
    planes = torch.cat([gray.double(), chroma.expand(len(gray), -1, *gray.shape[-2:])], dim=1)
    return torch.from_numpy(to_rgb(planes.numpy())).round().clamp(0, 255).to(torch.uint8)


def with_luma(made: Tensor, gray: Tensor) -> Tensor:
    """uint8 images with the chroma of ``made`` [N, 3, H, W] and the luma ``gray`` [N, 1, H, W].

    Colors that are not possible with this luma are clamped to [0, 255].
    """
    return with_chroma(gray, chroma_of(made))


def split_planes(pixels: Tensor) -> Tensor:
    """Y, Cb and Cr [..., 3, H, W] of RGB [..., 3, H, W], all in [-1, 1]; differentiable.

    It is computed from differences, so that for equal channels luma is exactly their value and chroma exactly 0.
    """
    red, green, blue = pixels.unbind(-3)
    luma = green + _RED * (red - green) + _BLUE * (blue - green)
    return torch.stack((luma, (blue - luma) / (2 - 2 * _BLUE), (red - luma) / (2 - 2 * _RED)), dim=-3)


def join_planes(planes: Tensor) -> Tensor:
    """The inverse of ``split_planes``."""
    luma, blue, red = planes.unbind(-3)
    blue, red = blue * (2 - 2 * _BLUE), red * (2 - 2 * _RED)
    green = -(_RED * red + _BLUE * blue) / (1 - _RED - _BLUE)
    return torch.stack((luma + red, luma + green, luma + blue), dim=-3)
