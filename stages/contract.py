"""The contract between the stages: a Tokenizer makes tokens, a Condition says what of, a Prior models them.

A new tokenizer is one file with a subclass of ``Tokenizer``, one line in ``stages/factory.py``, one YAML and one test.
The sampling engine sees ``begin / logits / advance`` of a Prior and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


@dataclass
class Prompts:
    """What is asked of each sample of a batch: a class, a text, both, or nothing."""

    labels: Tensor
    """int64 [B]; -1 is no class."""
    text: Tensor
    """Captions as a text encoder gives them: states float [B, T, W], or word ids int64 [B, T, 1]; T may be 0."""
    text_lengths: Tensor
    """int64 [B]: how many of the T count; 0 is no text."""

    @classmethod
    def of_labels(cls, labels: Tensor) -> Prompts:
        """Classes alone, from ids int64 [B]."""
        return cls(labels, labels.new_zeros(len(labels), 0, 1, dtype=torch.float32), torch.zeros_like(labels))

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> Prompts:
        """The prompts of a batch of cached tokens; text where the batch has it."""
        if "text" not in batch:
            return cls.of_labels(batch["label"])
        return cls(batch["label"], batch["text"], batch["text_length"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """Some of the prompts, in the order of ``rows``."""
        return Prompts(self.labels[rows], self.text[rows], self.text_lengths[rows])

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        return Prompts(self.labels.to(device), self.text.to(device), self.text_lengths.to(device))

    def without(self, labels: Tensor | bool = True, text: Tensor | bool = True) -> Prompts:
        """The same prompts without class or text where the bool [B] says so; without both everywhere by default."""
        return Prompts(
            self.labels.masked_fill(torch.as_tensor(labels, device=self.labels.device), -1),
            self.text,
            self.text_lengths.masked_fill(torch.as_tensor(text, device=self.labels.device), 0),
        )

    @classmethod
    def cat(cls, parts: Sequence[Prompts]) -> Prompts:
        """Prompts one after the other; shorter texts are padded."""
        longest = max(part.text.shape[1] for part in parts)
        widest = max(part.text.shape[2] for part in parts)
        kind = next((part.text.dtype for part in parts if part.text.shape[1]), parts[0].text.dtype)
        text = [
            functional.pad(
                part.text if part.text.shape[1] else part.text.new_zeros(len(part), 0, widest, dtype=kind),
                (0, 0, 0, longest - part.text.shape[1]),
            )
            for part in parts
        ]
        return cls(
            torch.cat([part.labels for part in parts]),
            torch.cat(text),
            torch.cat([part.text_lengths for part in parts]),
        )


@dataclass
class ConditionStates:
    """What a prior sees of its prompts."""

    prefix: Tensor
    """[B, P, width]: states that stand before the tokens."""
    memory: Tensor | None = None
    """[B, M, width]: states that every layer looks at by cross-attention; None where there are none."""
    memory_mask: Tensor | None = None
    """bool [B, M]: which of them count; at least one of each row does."""


class Condition(nn.Module, ABC):
    """What a prior is told about a sample."""

    num_states: int
    """P: states that stand before the tokens."""
    cross: bool = False
    """True where it also gives a memory for cross-attention."""
    uses_labels: bool
    """False where classes make no difference."""
    uses_text: bool = False
    """False where captions make no difference."""
    dropout: float
    """Share of training samples whose condition is dropped."""

    @abstractmethod
    def forward(self, prompts: Prompts) -> ConditionStates:
        """States of the prompts. Raises ValueError for class ids out of range or captions of another encoder."""

    def drop(self, prompts: Prompts) -> Prompts:
        """The prompts with a random share of conditions dropped, for training."""
        gone = torch.rand(len(prompts), device=prompts.labels.device) < self.dropout
        return prompts.without(gone, gone)


class Prior(nn.Module, ABC):
    """A model of token sequences. It knows their layout, never which tokenizer made them."""

    layout: TokenLayout
    condition: Condition
    class_names: list[str]
    text: dict[str, Any] | None
    """Spec of the text encoder whose states it was trained on; None without text."""

    @abstractmethod
    def nll(self, tokens: Tokens, prompts: Prompts) -> Tensor:
        """Negative log-likelihood in nats of every field: float32 [B, L, F]. ``tokens`` may be a prefix of scales."""

    @abstractmethod
    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int) -> Any:
        """State of a sequence of at most ``length`` elements that starts with ``prefix``."""

    @abstractmethod
    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """float32 [B, V] of the next field, given the fields int64 [B, f] of the same element chosen so far."""

    @abstractmethod
    def advance(self, state: Any, element: Tensor) -> None:
        """Append an element int64 [B, F]."""

    def compile_step(self) -> None:
        """Compile what ``advance`` runs, where that pays. Default: nothing to compile."""
