"""The coordinate networks that can be fitted to an image, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from stages.inr.networks import FourierRelu, Siren, Wire, WireReal
from stages.inr.split import Split


@dataclass(frozen=True)
class Variant:
    """One kind of network. All have about as many parameters for the same ``hidden`` and ``layers``."""

    build: Callable[[Tensor, int, int], nn.Module]
    """From the image (float32 [C, H, W] in [-1, 1]), the width of a hidden layer in real numbers, and the number of
    hidden layers: a network [P, 2] → [P, C]."""
    learning_rate: float
    """Adam's, at the start."""


VARIANTS: dict[str, Variant] = {
    # Tancik et al. 2020 fit images with 1e-3
    "fourier-relu": Variant(lambda image, hidden, layers: FourierRelu(hidden, layers, len(image)), 5e-3),
    # Sitzmann et al. 2020 fit images with 1e-4, over many more steps than are usual here
    "siren": Variant(lambda image, hidden, layers: Siren(hidden, layers, len(image)), 1e-3),
    # WIRE: 5e-3 for images
    "wire-real": Variant(lambda image, hidden, layers: WireReal(hidden, layers, len(image)), 5e-3),
    "wire": Variant(lambda image, hidden, layers: Wire(hidden, layers, len(image)), 5e-3),
    # the paper names none; found by trial on two photos of 64 px
    "split": Variant(lambda image, hidden, layers: Split(hidden, layers, image, singular=False), 2e-2),
    "split-singular": Variant(lambda image, hidden, layers: Split(hidden, layers, image, singular=True), 2e-2),
}
