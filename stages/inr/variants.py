"""Registry of coordinate networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from stages.inr.networks import FourierRelu, Siren, Wire, WireReal
from stages.inr.split import Split


@dataclass(frozen=True)
class Variant:
    """One kind of network. All have about the same number of parameters for equal ``hidden`` and ``layers``."""

    build: Callable[[Tensor, int, int], nn.Module]
    """Builds a network [P, 2] → [P, C] from the image (float32 [C, H, W] in [-1, 1]), the width of a hidden layer in
    real numbers, and the number of hidden layers."""
    learning_rate: float
    """Initial learning rate of Adam."""


VARIANTS: dict[str, Variant] = {
    # Rates are the best of 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2 (and 4e-2 if results still improved) after 400 steps on
    # two photos of 96 px, width 64. The papers use 1e-3 (Tancik et al. 2020), 1e-4 over many more steps (SIREN), 5e-3
    # (WIRE).
    "fourier-relu": Variant(lambda image, hidden, layers: FourierRelu(hidden, layers, len(image)), 2e-2),
    "siren": Variant(lambda image, hidden, layers: Siren(hidden, layers, len(image)), 2.5e-3),
    "wire-real": Variant(lambda image, hidden, layers: WireReal(hidden, layers, len(image)), 5e-3),
    "wire": Variant(lambda image, hidden, layers: Wire(hidden, layers, len(image)), 1e-2),
    "split": Variant(lambda image, hidden, layers: Split(hidden, layers, image, singular=False), 4e-2),
    "split-singular": Variant(lambda image, hidden, layers: Split(hidden, layers, image, singular=True), 4e-2),
}
