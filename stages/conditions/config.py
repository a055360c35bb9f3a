"""What a prior is told: one config section, ``condition``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ConditionConfig:
    """Conditioning of the prior."""

    kind: str = "class"
    """none, class, text or class-text; the kinds with text need tokens.text_encoder."""
    dropout: float = 0.1
    """Share of training samples whose condition is dropped, for classifier-free guidance."""
