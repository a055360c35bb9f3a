"""Haar and CDF 9/7 compared with PyWavelets, and Haar compared with copying the same bytes."""

from __future__ import annotations

import pywt
import torch

from pipeline.bench.figures import Figure, speeds
from pipeline.placement import wait_for
from stages.spectral.haar import haar_dwt, haar_idwt
from stages.spectral.wavelets import dwt, idwt

SHAPE = (32, 3, 256, 256)
LEVELS = 3


def bench_transforms(repeats: int, device: torch.device) -> list[Figure]:
    """Megapixels per second (of one channel) for a batch of color images, float32, analysis and synthesis."""
    pixels = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    settings = {"wavelet": "haar", "mode": "periodization", "axes": (-2, -1)}
    lifted = {**settings, "wavelet": "bior4.4"}
    array = pixels.numpy()
    coefficients = pywt.wavedec2(array, level=LEVELS, **settings)
    lifted_coefficients = pywt.wavedec2(array, level=LEVELS, **lifted)
    pixels = pixels.to(device)
    bands = haar_dwt(pixels, LEVELS)
    lifted_bands = dwt(pixels, LEVELS, "bior4.4")

    def settled(result: object) -> object:
        wait_for(device)
        return result

    return speeds(
        "transforms",
        {
            "Haar, analysis": lambda: settled(haar_dwt(pixels, LEVELS)),
            "PyWavelets, analysis": lambda: pywt.wavedec2(array, level=LEVELS, **settings),
            "Haar, synthesis": lambda: settled(haar_idwt(bands)),
            "PyWavelets, synthesis": lambda: pywt.waverec2(coefficients, **settings),
            "Haar, analysis again": lambda: settled(haar_dwt(pixels, LEVELS)),
            "9/7, analysis": lambda: settled(dwt(pixels, LEVELS, "bior4.4")),
            "PyWavelets 9/7, analysis": lambda: pywt.wavedec2(array, level=LEVELS, **lifted),
            "9/7, synthesis": lambda: settled(idwt(lifted_bands, "bior4.4")),
            "PyWavelets 9/7, synthesis": lambda: pywt.waverec2(lifted_coefficients, **lifted),
            "a copy": lambda: settled(pixels.clone()),
        },
        pixels.numel() / 1e6,
        "Mpixels/s",
        repeats,
        {
            "Haar, analysis": ("PyWavelets, analysis", (">=", 3.0)),
            "Haar, synthesis": ("PyWavelets, synthesis", None),
            "Haar, analysis again": ("a copy", (">=", 1 / 1.2)),
            "9/7, analysis": ("PyWavelets 9/7, analysis", None),
            "9/7, synthesis": ("PyWavelets 9/7, synthesis", None),
        },
    )
