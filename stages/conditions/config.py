"""Config section ``condition``: the conditioning of the prior."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ConditionConfig:
    """Conditioning of the prior."""

    kind: str = "class"
    """none, class, text or class-text; text and class-text need tokens.text_encoder."""
    dropout: float = 0.1
    """Fraction of training samples whose condition is dropped, for classifier-free guidance."""


@dataclass
class NoConditionConfig(ConditionConfig):
    """An unconditional prior."""

    kind: str = "none"
    dropout: float = 0.0


@dataclass
class ClassConditionConfig(ConditionConfig):
    """A class id for each sample."""

    kind: str = "class"


@dataclass
class TextConditionConfig(ConditionConfig):
    """A caption for each sample."""

    kind: str = "text"
    attend: str = "prefix"
    """prefix (caption states before the tokens) or cross (cross-attention in every layer)."""


@dataclass
class ClassTextConditionConfig(TextConditionConfig):
    """A class and a caption. Each is also dropped alone in training, so that either can be given without the other."""

    kind: str = "class-text"
