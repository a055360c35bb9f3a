"""The contract between the stages: a Tokenizer makes tokens, a Condition says what of, a Prior models them.

Where what may come next depends on what was there, a Grammar (``stages/grammar.py``) knows it, for both alike.

A new tokenizer is one file with a subclass of ``Tokenizer``, one line in ``stages/factory.py``, one YAML and one test.
The sampling engine sees ``begin / logits / advance / ended`` of a Prior and the order in which it writes, nothing else;
one of ``order=scale`` has ``look`` besides, and advances by scales (``stages/prior/scalewise.py``).
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
"""Logit of an id that cannot come: finite, so that guidance can subtract it."""


class RefusedImage(InputError):
    """An image that a codec will not code; ``row`` is its place in the batch."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"image {row} of the batch: {reason}")
        self.row, self.reason = row, reason


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
    target: Tensor | None = None
    """What the reconstruction should be, like it; None for the pixels themselves."""


class Tokenizer(OwnPrecision, nn.Module, ABC):
    """Pixels → tokens → pixels. Pixels are float32 [B, C, H, W] in [-1, 1]."""

    IN_PRECISION = ("encode", "decode", "render")
    layout: TokenLayout
    channels: int

    @property
    def trainable(self) -> bool:
        """True where stage 1 has weights to train; a codec is only fitted."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def renders(self) -> bool:
        """True where ``render`` gives other sizes than its own."""
        return False

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure and store statistics of (pixels [B, C, H, W], labels int64 [B]; -1 for none) before training.

        Default: nothing to measure.
        """

    def statistics(self) -> dict[str, Any]:
        """What ``fit`` measured beside the weights, as plain data for JSON; it is stored with them."""
        return {}

    def restore(self, statistics: dict[str, Any]) -> None:
        """The inverse of ``statistics``. Raises KeyError or ValueError on foreign data."""

    def forward(self, pixels: Tensor, large: Tensor | None = None) -> TokenizerOutput:
        """One training pass of a learned tokenizer; ``large`` [B, C, kH, kW] are the same images, where they are known
        at a multiple of the size."""
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

    def render(self, tokens: Tokens, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> Tensor:
        """Pixels [B, C, height, width] at any ``size`` (height, width), or their part ``crop`` (top, left, height,
        width), in [-1, 1], clamped.

        Raises ValueError for a tokenizer without a head, a size or crop that is none; otherwise like ``decode``.
        """
        raise InputError("a codec decodes at its own size only; it has no head for others")

    def reference(self, pixels: Tensor, num_scales: int) -> Tensor:
        """What the first ``num_scales`` scales should look like: pixels [B, C, h, w]."""
        if num_scales != len(self.layout.scales):
            raise PrefixUnsupported(f"{type(self).__name__} has no reference for {num_scales} scales")
        return pixels

    def first_scales(self, tokens: Tokens, num_scales: int) -> Tokens:
        """The first scales of tokens that have more."""
        return tokens.prefix(self.layout.prefix_length(num_scales))

    def start_prefix(self, labels: Tensor, seeds: Sequence[int]) -> Tokens | None:
        """Header and first elements with which new samples of class ids [B] (-1: none) begin, each drawn by its seed.

        None where a prior begins by itself.
        """
        return None

    def header_bits(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """What the side information costs: floats [B], in bits, given class ids [B] (-1: none)."""
        return torch.zeros(len(tokens))


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


@dataclass
class PriorOutput:
    """What a prior says of given tokens."""

    nll: Tensor
    """Negative log-likelihood in nats of every field: float32 [B, L, F]; 0 behind a sample's length. Where a grammar
    forbids ids, the others share the probability."""
    legal_nll: Tensor | None = None
    """float32 [B, L]: negative log of what the network itself gives to the ids that may come; training adds it to the
    loss, so the network learns the grammar. 0 behind a sample's length; None without a grammar."""
    saved: Tensor | None = None
    """float32 [B, L]: nats that the element would cost besides, were those ids allowed that only the elements before
    make impossible; None without a grammar."""

    judged: Tensor | None = None
    """bool [B, L]: the elements that it speaks of, where training takes a part of each sample; None for all."""
    confidence: Tensor | None = None
    """float32 [B, L, F]: probability of the most likely id of every field; None while training, and where a prior does
    not say."""
    hit: Tensor | None = None
    """bool [B, L, F]: whether that is the id given; None like ``confidence``."""

    @property
    def illegal(self) -> Tensor | None:
        """float32 [B, L]: probability that the network itself gives to ids that cannot come; None without a grammar."""
        return None if self.legal_nll is None else -torch.expm1(-self.legal_nll.detach())


class Prior(OwnPrecision, nn.Module, ABC):
    """A model of token sequences. It knows their layout, never which tokenizer made them."""

    IN_PRECISION = ("forward", "begin", "logits", "advance", "look")
    layout: TokenLayout
    condition: Condition
    class_names: list[str]
    text: dict[str, Any] | None
    """Spec of the text encoder whose states it was trained on; None without text."""

    grammar: Grammar | None
    """What may come next, where the layout has a grammar."""
    order: str = "natural"
    """The order in which it models the elements; natural is the layout's own."""
    likelihood: bool = True
    """False where its ``nll`` is of masked elements, given others behind them: that is no rate of the sequence."""

    @property
    def max_length(self) -> int:
        """Elements that it models: a longer stream is cut there."""
        return self.layout.length

    @abstractmethod
    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """What it says of tokens, which may be a prefix of scales or of a stream."""

    def nll(self, tokens: Tokens, prompts: Prompts) -> Tensor:
        """Negative log-likelihood in nats of every field: float32 [B, L, F]."""
        output: PriorOutput = self(tokens, prompts)
        return output.nll

    def scale_at(self, position: int) -> int:
        """The scale of the element that it models at ``position``, in a layout of fixed length."""
        return self.layout.scale_at(position)

    @property
    def writes_prefixes(self) -> bool:
        """True where the first scales come first: they may be given, and it may stop after them."""
        return self.order in PREFIX_ORDERS

    def to_own_order(self, tokens: Tokens, whole: Sequence[int] = ()) -> Tokens:
        """Tokens in the order in which this prior models them; default: the layout's own.

        Of a part it is said by ``whole`` which scales it consists of; else it is the layout's beginning. Raises
        InputError for a part with which this prior does not begin.
        """
        return tokens

    def to_layout_order(self, tokens: Tokens) -> Tokens:
        """The inverse of ``to_own_order``."""
        return tokens

    @abstractmethod
    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> Any:
        """State of a sequence of at most ``length`` elements that starts with ``prefix``, whose rows are equally long.

        The prefix is in this prior's order, and brings the header where the layout has one. Of the scales ``whole`` no
        more than it brings will come, though a list could have more. Raises ValueError where others precede them.
        """

    @abstractmethod
    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """float32 [B, V] of the next field, given the fields int64 [B, f] of the same element chosen so far.

        An id that a grammar forbids has ``FORBIDDEN``.
        """

    @abstractmethod
    def advance(self, state: Any, element: Tensor) -> None:
        """Append an element int64 [B, F]."""

    def ended(self, state: Any, num_scales: int) -> Tensor | None:
        """bool [B], on the CPU: which have all of their first ``num_scales`` scales; None for a fixed length."""
        return None

    def compile_step(self) -> None:
        """Compile what ``advance`` runs, where that pays. Default: nothing to compile."""
