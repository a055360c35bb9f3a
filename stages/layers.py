"""What an optimiser must know of a network's layers: which are hidden, and which are several in one."""

from __future__ import annotations

from torch import nn


class HiddenLayers(nn.Module):
    """A part of a network with features on both sides: its linear layers are neither embeddings nor heads.

    Blocks of transformers are such parts. Muon updates the matrices of linear layers in here, and nothing else.
    """


class FusedLinear(nn.Linear):
    """``parts`` linear layers of one input, each to ``outputs`` features, computed as one.

    Its weight [parts · outputs, inputs] is ``parts`` matrices, one above the other.
    """

    def __init__(self, inputs: int, outputs: int, parts: int, bias: bool = True) -> None:
        super().__init__(inputs, parts * outputs, bias)
        self.parts = parts
