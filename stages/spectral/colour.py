"""RGB and YCbCr as JPEG has them (ITU-T T.871), with chroma around 0, so that black is 0 in every plane."""

from __future__ import annotations

import numpy as np

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
    """Y, Cb and Cr float64 [N, 3, H, W] of RGB [N, 3, H, W]: Y from 0 to 1 as RGB is, Cb and Cr from -1/2 to 1/2."""
    return np.einsum("ij,njhw->nihw", _FORWARD, pixels)


def to_rgb(planes: np.ndarray) -> np.ndarray:
    """The inverse of ``to_ycbcr``."""
    return np.einsum("ij,njhw->nihw", _INVERSE, planes)
