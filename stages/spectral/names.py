"""Names of the supported wavelets, as in PyWavelets."""

from __future__ import annotations

from functools import lru_cache

import pywt

HAAR = ("haar", "db1")
LIFTED: dict[str, tuple[tuple[float, ...], float]] = {
    "bior2.2": ((-0.5, 0.25), 1.0),
    "bior4.4": (
        (-1.5861343420599235, -0.0529801185729614, 0.8829110755309333, 0.4435068520439712),
        1.2301741049140359,
    ),
}
"""Lifting weights of the two neighbors, alternately for odd and even samples, and the sum of the low-pass filter."""
WAVELETS = f"haar, {', '.join(LIFTED)}, or an orthogonal wavelet of PyWavelets such as db2, sym4, coif1"
"""Names that ``dwt`` supports, as text for error messages."""


@lru_cache
def orthogonal_wavelets() -> tuple[str, ...]:
    """PyWavelets' names of exactly orthogonal wavelets. This excludes ``dmey``, which is only an approximation."""
    names = pywt.wavelist(kind="discrete")
    return tuple(name for name in names if name != "dmey" and pywt.Wavelet(name).orthogonal)


def is_wavelet(name: str) -> bool:
    """True if ``dwt`` supports a wavelet of this name."""
    return name in HAAR or name in LIFTED or name in orthogonal_wavelets()
