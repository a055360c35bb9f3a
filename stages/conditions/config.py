"""What a prior is told: one config section, ``condition``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ConditionConfig:
    """Conditioning of the prior."""

    kind: str = "class"
    """class or none."""
    dropout: float = 0.1
    """Share of training samples whose condition is dropped, for classifier-free guidance."""
