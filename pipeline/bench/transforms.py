"""The Haar transform against PyWavelets' and a copy of the same bytes."""

from __future__ import annotations

import pywt
import torch

from pipeline.bench.figures import Figure, speeds
from stages.spectral.haar import haar_dwt, haar_idwt

SHAPE = (32, 3, 256, 256)
LEVELS = 3


def bench_transforms(repeats: int, device: torch.device) -> list[Figure]:
    """Megapixels a second (of one channel) of a batch of colour images, float32, there and back."""
    pixels = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    settings = {"wavelet": "haar", "mode": "periodization", "axes": (-2, -1)}
    array = pixels.numpy()
    coefficients = pywt.wavedec2(array, level=LEVELS, **settings)
    pixels = pixels.to(device)
    bands = haar_dwt(pixels, LEVELS)

    def settled(result: object) -> object:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    return speeds(
        "transforms",
        {
            "Haar, analysis": lambda: settled(haar_dwt(pixels, LEVELS)),
            "PyWavelets, analysis": lambda: pywt.wavedec2(array, level=LEVELS, **settings),
            "Haar, synthesis": lambda: settled(haar_idwt(bands)),
            "PyWavelets, synthesis": lambda: pywt.waverec2(coefficients, **settings),
            "Haar, analysis again": lambda: settled(haar_dwt(pixels, LEVELS)),
            "a copy": lambda: settled(pixels.clone()),
        },
        pixels.numel() / 1e6,
        "Mpixels/s",
        repeats,
        {
            "Haar, analysis": ("PyWavelets, analysis", (">=", 3.0)),
            "Haar, synthesis": ("PyWavelets, synthesis", None),
            "Haar, analysis again": ("a copy", (">=", 1 / 1.2)),
        },
    )
