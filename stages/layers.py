"""Layers that tell the optimizer which matrices are hidden, and which weights hold several matrices."""

from __future__ import annotations

from torch import nn


class HiddenLayers(nn.Module):
    """Base class of hidden parts of a network, such as transformer blocks: no embeddings and no output heads.

    Muon updates only the matrices of linear layers in these parts.
    """


class FusedLinear(nn.Linear):
    """``parts`` linear layers with the same input and ``outputs`` features each, computed as one.

    Its weight [parts · outputs, inputs] is a vertical stack of ``parts`` matrices.
    """

    def __init__(self, inputs: int, outputs: int, parts: int, bias: bool = True) -> None:
        super().__init__(inputs, parts * outputs, bias)
        self.parts = parts
