"""Base classes of the two stages: a Tokenizer makes tokens, a Condition encodes prompts, a Prior models the tokens.

If the valid next tokens depend on earlier ones, a Grammar (``stages/grammar.py``) defines them for both stages.

A new tokenizer needs a file with a subclass of ``Tokenizer``, a line in ``stages/factory.py``, a YAML and a test. The
sampling engine uses only ``begin / logits / advance / ended`` of a Prior and its order. A Prior with ``order=scale``
also has ``look`` and advances by whole scales (``stages/prior/scalewise.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError, OctavesError
from data.layout import TokenLayout, Tokens
from stages.grammar import Grammar
from stages.precision import OwnPrecision
from stages.prior.config import PREFIX_ORDERS

FORBIDDEN = -1e9
"""Logit of a forbidden id: finite, so that guidance can subtract it."""


class RefusedImage(InputError):
    """An image that a codec cannot encode; ``row`` is its index in the batch."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"image {row} of the batch: {reason}")
        self.row, self.reason = row, reason


class PrefixUnsupported(OctavesError, ValueError):
    """A prefix of scales was requested, but the encoder or decoder needs all scales."""


@dataclass
class TokenizerOutput:
    """Output of a training forward pass of a learned tokenizer."""

    reconstruction: Tensor
    """float32 [B, C, H, W], not clamped"""
    ids: Tensor
    """int64 [B, L, F]"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalar loss terms of the quantizer by name. Their weights are in the training config."""
    target: Tensor | None = None
    """Target of the reconstruction, float32 [B, C, H, W]; None for the input pixels."""


class Tokenizer(OwnPrecision, nn.Module, ABC):
    """Pixels → tokens → pixels. Pixels are float32 [B, C, H, W] in [-1, 1]."""

    IN_PRECISION = ("encode", "decode", "render")
    layout: TokenLayout
    channels: int

    @property
    def trainable(self) -> bool:
        """True if there are weights to train in stage 1; codecs are only fitted."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def renders(self) -> bool:
        """True if ``render`` supports sizes other than the tokenizer's own."""
        return False

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure and store statistics of batches (pixels [B, C, H, W], labels int64 [B]; -1 for none) before training.

        Default: does nothing.
        """

    def statistics(self) -> dict[str, Any]:
        """Statistics measured by ``fit``, as plain data for JSON; stored with the weights."""
        return {}

    def restore(self, statistics: dict[str, Any]) -> None:
        """Load the result of ``statistics``. Raises KeyError or ValueError for invalid data."""

    def forward(self, pixels: Tensor, large: Tensor | None = None) -> TokenizerOutput:
        """Training forward pass of a learned tokenizer. ``large`` [B, C, kH, kW] are the same images at k times the
        size, if available."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to train")

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tokens:
        """Encode pixels of full size. If the layout ``encodes_prefixes``, smaller rungs give the first scales.

        Raises ValueError for a size that is no rung, PrefixUnsupported for a rung that this encoder does not support.
        """

    @abstractmethod
    def decode(self, tokens: Tokens) -> Tensor:
        """Decode tokens to pixels [B, C, h, w], clamped to [-1, 1], at the size of the given scales.

        Raises PrefixUnsupported if scales are missing that the decoder needs, ValueError for ids out of range.
        """

    def render(self, tokens: Tokens, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> Tensor:
        """Decode tokens to pixels [B, C, height, width] of any ``size`` (height, width), clamped to [-1, 1].

        ``crop`` (top, left, height, width) selects a part of the result. Raises ValueError for a tokenizer without a
        head and for an invalid size or crop, and the errors of ``decode``.
        """
        raise InputError("a codec decodes at its own size only; it has no head for others")

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """Target image of the first ``num_scales`` scales: pixels [B, C, h, w]. Raises PrefixUnsupported if none."""
        if num_scales != len(self.layout.scales):
            raise PrefixUnsupported(f"{type(self).__name__} has no reference for {num_scales} scales")
        return pixels

    def first_scales(self, tokens: Tokens, num_scales: int) -> Tokens:
        """The first ``num_scales`` scales of tokens."""
        return tokens.prefix(self.layout.prefix_length(num_scales))

    def start_prefix(self, labels: Tensor, seeds: Sequence[int]) -> Tokens | None:
        """Header and first elements of new samples, for class ids [B] (-1: none), each drawn with its seed.

        None if a prior samples from the first element.
        """
        return None

    def header_bits(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Cost of the side information in bits: float [B], given class ids [B] (-1: none)."""
        return torch.zeros(len(tokens))


@dataclass
class Prompts:
    """Prompts for a batch of samples: a class, a text, both, or none for each sample."""

    labels: Tensor
    """int64 [B]; -1 for no class."""
    text: Tensor
    """Encoded captions: states float [B, T, W], or word ids int64 [B, T, 1]; T may be 0."""
    text_lengths: Tensor
    """int64 [B]: number of valid states of each caption; 0 for no text."""

    @classmethod
    def of_labels(cls, labels: Tensor) -> Prompts:
        """Prompts with classes only, from ids int64 [B]."""
        return cls(labels, labels.new_zeros(len(labels), 0, 1, dtype=torch.float32), torch.zeros_like(labels))

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> Prompts:
        """The prompts of a batch of a token cache, with text if the batch has it."""
        if "text" not in batch:
            return cls.of_labels(batch["label"])
        return cls(batch["label"], batch["text"], batch["text_length"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Prompts:
        """The prompts ``rows``, in that order."""
        return Prompts(self.labels[rows], self.text[rows], self.text_lengths[rows])

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        return Prompts(self.labels.to(device), self.text.to(device), self.text_lengths.to(device))

    def without(self, labels: Tensor | bool = True, text: Tensor | bool = True) -> Prompts:
        """Remove the class or text of the rows where bool [B] is True; by default both, for all rows."""
        return Prompts(
            self.labels.masked_fill(torch.as_tensor(labels, device=self.labels.device), -1),
            self.text,
            self.text_lengths.masked_fill(torch.as_tensor(text, device=self.labels.device), 0),
        )

    @classmethod
    def cat(cls, parts: Sequence[Prompts]) -> Prompts:
        """Concatenate prompts; shorter texts are padded."""
        longest = max(part.text.shape[1] for part in parts)
        width = max(part.text.shape[2] for part in parts)
        dtype = next((part.text.dtype for part in parts if part.text.shape[1]), parts[0].text.dtype)
        text = [
            functional.pad(
                part.text if part.text.shape[1] else part.text.new_zeros(len(part), 0, width, dtype=dtype),
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
    """Encoded prompts, the input of a prior."""

    prefix: Tensor
    """[B, P, width]: states before the tokens."""
    memory: Tensor | None = None
    """[B, M, width]: states for cross-attention in every layer; None without cross-attention."""
    memory_mask: Tensor | None = None
    """bool [B, M]: False for padding; each row has at least one True."""


class Condition(nn.Module, ABC):
    """Encodes prompts into states for a prior."""

    num_states: int
    """P: number of states before the tokens."""
    cross: bool = False
    """True if it also returns a memory for cross-attention."""
    uses_labels: bool
    """False if classes are ignored."""
    uses_text: bool = False
    """False if captions are ignored."""
    dropout: float
    """Fraction of training samples whose condition is dropped."""

    @abstractmethod
    def forward(self, prompts: Prompts) -> ConditionStates:
        """Encode prompts. Raises ValueError for class ids out of range or captions of another text encoder."""

    def drop(self, prompts: Prompts) -> Prompts:
        """Drop the conditions of a random fraction of the prompts, for training."""
        dropped = torch.rand(len(prompts), device=prompts.labels.device) < self.dropout
        return prompts.without(dropped, dropped)


@dataclass
class PriorOutput:
    """Scores of a prior for given tokens."""

    nll: Tensor
    """Negative log-likelihood in nats of every field: float32 [B, L, F]; 0 for padding. Probabilities are renormalized
    over the ids that the grammar allows."""
    legal_nll: Tensor | None = None
    """float32 [B, L]: negative log of the probability that the network assigns to all allowed ids together. Training
    adds it to the loss, so that the network learns the grammar. 0 for padding; None without a grammar."""
    saved: Tensor | None = None
    """float32 [B, L]: extra nats if ids ruled out only by earlier elements were allowed; None without a grammar."""

    judged: Tensor | None = None
    """bool [B, L]: scored elements, if training uses only a part of each sample; None for all."""
    confidence: Tensor | None = None
    """float32 [B, L, F]: probability of the most likely id of every field; None in training and for priors that do not
    compute it."""
    hit: Tensor | None = None
    """bool [B, L, F]: True if the most likely id is the given one; None like ``confidence``."""

    @property
    def illegal(self) -> Tensor | None:
        """float32 [B, L]: probability that the network assigns to forbidden ids; None without a grammar."""
        return None if self.legal_nll is None else -torch.expm1(-self.legal_nll.detach())


class Prior(OwnPrecision, nn.Module, ABC):
    """Model of token sequences. It knows their layout, but not the tokenizer."""

    IN_PRECISION = ("forward", "begin", "logits", "advance", "look")
    layout: TokenLayout
    condition: Condition
    class_names: list[str]
    text: dict[str, Any] | None
    """Spec of the text encoder of its training captions; None without text."""

    grammar: Grammar | None
    """Grammar of the layout; None without."""
    order: str = "natural"
    """Order in which the prior models the elements; natural is the order of the layout."""
    likelihood: bool = True
    """False if ``nll`` is of masked elements given later ones. That is not the likelihood of the sequence."""

    @property
    def max_length(self) -> int:
        """Maximum number of elements; longer streams are cut."""
        return self.layout.length

    @abstractmethod
    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """Score tokens, which may be a prefix of scales or of a stream."""

    def nll(self, tokens: Tokens, prompts: Prompts) -> Tensor:
        """Negative log-likelihood in nats of every field: float32 [B, L, F]."""
        output: PriorOutput = self(tokens, prompts)
        return output.nll

    def scale_at(self, position: int) -> int:
        """The scale of the element at ``position`` in this prior's order, in a layout of fixed length."""
        return self.layout.scale_at(position)

    @property
    def writes_prefixes(self) -> bool:
        """True if the order starts with the first scales, so they can be given as a prefix, or sampled alone."""
        return self.order in PREFIX_ORDERS

    def to_own_order(self, tokens: Tokens, whole: Sequence[int] = ()) -> Tokens:
        """Sort tokens into the order of this prior. Default: the order of the layout.

        If the tokens are only a part of a sample, ``whole`` lists its scales; without it, they are a prefix of the
        layout. Raises InputError if the order of this prior does not start with this part.
        """
        return tokens

    def to_layout_order(self, tokens: Tokens) -> Tokens:
        """The inverse of ``to_own_order``."""
        return tokens

    @abstractmethod
    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> Any:
        """State of a sequence of at most ``length`` elements that starts with ``prefix``.

        The prefix is in this prior's order and has the same length in every row; it contains the header if the layout
        has one. The scales ``whole`` are complete: no further elements of them are sampled, even if a list allows more.
        Raises ValueError if other scales precede them.
        """

    @abstractmethod
    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """Logits float32 [B, V] of the next field, given the earlier fields int64 [B, f] of the same element.

        The logit of ids that the grammar forbids is ``FORBIDDEN``.
        """

    @abstractmethod
    def advance(self, state: Any, element: Tensor) -> None:
        """Append an element int64 [B, F]."""

    def ended(self, state: Any, num_scales: int) -> Tensor | None:
        """bool [B], on the CPU: True if the first ``num_scales`` scales are complete; None for a fixed length."""
        return None

    def compile_step(self) -> None:
        """Compile the computation of ``advance`` if that is faster. Default: does nothing."""
