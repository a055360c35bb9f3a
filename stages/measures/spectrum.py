"""Power spectra: which frequencies an image decoded from the first scales contains.

Design notes:

- frequencies are in cycles per side of the image, so images of different sizes are comparable;
- images are multiplied by a Hann window, because opposite borders of photos differ: without the window, this jump would
  hide missing high frequencies. The window spreads every frequency over its two neighbors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SIDE = 4
"""Smallest image side, in pixels, that has a spectrum."""
FLOOR = 1e-12
"""Lower bound of power for logarithms, far below the rounding of 8-bit images."""


def power_spectrum(pixels: Tensor) -> Tensor:
    """Radially averaged power of uint8 images [N, C, s, s]: float64 [R] at 1, 2, … cycles per side, below s / 2.

    It is the squared modulus of the windowed Fourier transform, averaged over images, channels and the frequencies of
    each ring (radii rounded to integers), and normalized so that a wave has the same power at every image size. The
    mean of each image is subtracted, and pixels are scaled to [-1, 1]. The frequency s / 2 is left out, because a wave
    may be sampled at its zeros there. Raises ValueError for images that are not square or smaller than 4 px.
    """
    side = pixels.shape[-1]
    if pixels.shape[-2] != side or side < SMALLEST_SIDE:
        raise ValueError(f"images have {tuple(pixels.shape[-2:])} px; a spectrum needs square images of 4 px or more")
    slope = torch.sin(torch.pi * (torch.arange(side).double() + 0.5) / side).square()
    window = slope[:, None] * slope
    window = window / window.sum()
    power = torch.zeros(side, side, dtype=torch.float64)
    for part in pixels.split(128):
        images = part.double() / 127.5 - 1
        images = images - (window * images).sum((2, 3), keepdim=True)
        power += torch.fft.fft2(window * images).abs().square().sum((0, 1))
    power /= pixels.shape[0] * pixels.shape[1]
    frequency = torch.fft.fftfreq(side, 1 / side).double()
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long()
    sums = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add(0, radius.flatten(), power.flatten())
    return (sums / torch.bincount(radius.flatten()))[1 : (side + 1) // 2]


def octaves_of(spectrum: Tensor) -> Tensor:
    """Power of a spectrum [R] in the octaves [1, 2), [2, 4), … cycles per side: float64 [bands].

    The last octave may be incomplete.
    """
    cycles = torch.arange(1, len(spectrum) + 1)
    # the number of frequencies of a ring is proportional to its radius
    weighted = spectrum.double() * cycles
    band = cycles.double().log2().floor().long()
    return torch.zeros(int(band.max()) + 1, dtype=torch.float64).index_add(0, band, weighted)


def decibels_over(spectrum: Tensor, other: Tensor) -> list[float]:
    """10 log10 of the ratio of the powers ``spectrum`` [R] and ``other`` [S], up to the shorter length."""
    reach = min(len(spectrum), len(other))
    both = (power[:reach].clamp(min=FLOOR).log10() for power in (spectrum, other))
    first, second = both
    return (10 * (first - second)).tolist()


def measure_frequencies(images: Tensor, decoded: Tensor, wanted: Tensor) -> dict[str, Any] | None:
    """Power of ``decoded`` and its target ``wanted`` (both uint8 [N, C, h, h]) relative to that of the full images.

    ``images`` is the spectrum [R] of the full images. The result is in dB, at every integer frequency and in every
    octave; None for images that are not square or too small.
    """
    height, width = decoded.shape[-2:]
    if height != width or height < SMALLEST_SIDE:
        return None
    measured: dict[str, Any] = {"image_size": [height, width]}
    for name, pixels in (("decoded", decoded), ("wanted", wanted)):
        spectrum = power_spectrum(pixels)
        reach = min(len(spectrum), len(images))
        measured[name] = decibels_over(spectrum, images)
        measured[f"{name}_octaves"] = decibels_over(octaves_of(spectrum[:reach]), octaves_of(images[:reach]))
    return measured
