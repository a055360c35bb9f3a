"""The contract between the stages: a Tokenizer makes tokens, a Condition says what of, a Prior models them.

A new tokenizer is one file with a subclass of ``Tokenizer``, one line in ``stages/factory.py``, one YAML and one test.
The sampling engine sees ``begin / logits / advance`` of a Prior and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from data.errors import OctavesError
from data.layout import TokenLayout, Tokens


class PrefixUnsupported(OctavesError, ValueError):
    """A prefix of scales was asked of a tokenizer whose encoder or decoder needs all of them."""


@dataclass
class TokenizerOutput:
    """What the training of a learned tokenizer needs from one forward pass."""

    reconstruction: Tensor
    """float32 [B, C, H, W], not clamped"""
    ids: Tensor
    """int64 [B, L, F]"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar loss terms of the quantiser by name; their weights stand in the training config."""


class Tokenizer(nn.Module, ABC):
    """Pixels → tokens → pixels. Pixels are float32 [B, C, H, W] in [-1, 1]."""

    layout: TokenLayout
    channels: int

    @property
    def trainable(self) -> bool:
        """True where stage 1 has weights to train; a codec is only fitted."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure and store statistics of pixels [B, C, H, W] before training. Default: nothing to measure."""

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """One training pass of a learned tokenizer."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to train")

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tokens:
        """Tokens of full-size pixels; where the layout ``encodes_prefixes``, a smaller rung gives the first scales.

        Raises ValueError for a side that is no rung, PrefixUnsupported for a rung that this encoder cannot take.
        """

    @abstractmethod
    def decode(self, tokens: Tokens) -> Tensor:
        """Pixels [B, C, h, w] in [-1, 1], clamped, at the size of the scales present.

        Raises PrefixUnsupported when scales are missing that the decoder needs, ValueError for ids out of range.
        """

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """What the first ``num_scales`` scales should look like: pixels [B, C, h, w]."""
        if num_scales != len(self.layout.scales):
            raise PrefixUnsupported(f"{type(self).__name__} has no reference for {num_scales} scales")
        return pixels


class Condition(nn.Module, ABC):
    """What a prior is told about a sample, as states [B, num_states, width] that stand before its tokens."""

    num_states: int
    uses_labels: bool
    """False where every sample gets the same states."""
    dropout: float
    """Share of training samples whose condition is dropped."""

    @abstractmethod
    def forward(self, labels: Tensor) -> Tensor:
        """States [B, num_states, width] of class ids int64 [B]; -1 is no condition. Raises ValueError out of range."""


class Prior(nn.Module, ABC):
    """A model of token sequences. It knows their layout, never which tokenizer made them."""

    layout: TokenLayout
    condition: Condition
    class_names: list[str]

    @abstractmethod
    def nll(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every field: float32 [B, L, F]. ``tokens`` may be a prefix of scales."""

    @abstractmethod
    def begin(self, labels: Tensor, prefix: Tokens | None, length: int) -> Any:
        """State of a sequence of at most ``length`` elements that starts with ``prefix``."""

    @abstractmethod
    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """float32 [B, V] of the next field, given the fields int64 [B, f] of the same element chosen so far."""

    @abstractmethod
    def advance(self, state: Any, element: Tensor) -> None:
        """Append an element int64 [B, F]."""

    def compile_step(self) -> None:
        """Compile what ``advance`` runs, where that pays. Default: nothing to compile."""
