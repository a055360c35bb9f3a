"""Power over frequency: does an image made of the first scales carry the frequencies that it should?

What is notable here:

- frequencies are cycles per side of the image, so images of different sizes compare;
- a Hann window, for the borders of photos do not meet: without it their jump hides what is missing at high
  frequencies. It spreads every frequency over its two neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SIDE = 4
"""Side in pixels of the smallest images that have a spectrum."""
FLOOR = 1e-12
"""Power that counts as none: far below the rounding of 8-bit images."""


def power_spectrum(pixels: Tensor) -> Tensor:
    """Radially averaged power of uint8 images [N, C, s, s] below s / 2 cycles a side: float64 [R], 1, 2, … cycles.

    The mean over images, channels and the frequencies of each ring (rounded to whole radii) of the squared modulus of
    the windowed Fourier transform, so normalised that a wave has the same power at every size. An image's own mean is
    taken out. Pixels count in [-1, 1]; s / 2 itself is left out, for there a wave may be sampled at its zeros. Raises
    ValueError for sides that differ or are under 4 px.
    """
    side = pixels.shape[-1]
    if pixels.shape[-2] != side or side < SMALLEST_SIDE:
        raise ValueError(f"a spectrum needs square images of 4 px or more, not {tuple(pixels.shape[-2:])}")
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
    """Power in the octaves [1, 2), [2, 4), … cycles a side of a spectrum [R]: float64 [bands], the last may be cut."""
    cycles = torch.arange(1, len(spectrum) + 1)
    # a ring has as many frequencies as it is long
    weighted = spectrum.double() * cycles
    band = cycles.double().log2().floor().long()
    return torch.zeros(int(band.max()) + 1, dtype=torch.float64).index_add(0, band, weighted)


def decibels_over(spectrum: Tensor, other: Tensor) -> list[float]:
    """10 log10 of the power [R] over the other's [S], as far as both reach."""
    reach = min(len(spectrum), len(other))
    both = (each[:reach].clamp(min=FLOOR).log10() for each in (spectrum, other))
    first, second = both
    return (10 * (first - second)).tolist()


def measure_frequencies(images: Tensor, decoded: Tensor, wanted: Tensor) -> dict[str, Any] | None:
    """Power of ``decoded`` and of what it should be (``wanted``, both uint8 [N, C, h, h]) over that of the images.

    ``images`` is the images' own spectrum [R]. In dB, at every whole frequency and in every octave; None for sides too
    small or unequal.
    """
    height, width = decoded.shape[-2:]
    if height != width or height < SMALLEST_SIDE:
        return None
    found: dict[str, Any] = {"image_size": [height, width]}
    for name, pixels in (("decoded", decoded), ("wanted", wanted)):
        spectrum = power_spectrum(pixels)
        reach = min(len(spectrum), len(images))
        found[name] = decibels_over(spectrum, images)
        found[f"{name}_octaves"] = decibels_over(octaves_of(spectrum[:reach]), octaves_of(images[:reach]))
    return found
