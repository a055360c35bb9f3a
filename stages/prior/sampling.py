"""Sampling, apart from the model that it samples."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SamplingConfig:
    """How tokens are drawn: one config section, ``sampling``. Lists have one value, or one per scale."""

    temperature: list[float] = field(default_factory=lambda: [1.0])
    """Divides the logits; one value or one per scale."""
    top_k: list[int] = field(default_factory=lambda: [0])
    """Keep the k most probable ids; 0 keeps all. One value or one per scale."""
    top_p: list[float] = field(default_factory=lambda: [1.0])
    """Keep the most probable ids up to this mass. One value or one per scale."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = unconditional + guidance * (conditional - unconditional); 1 is off."""
    guidance_schedule: str = "constant"
    """constant, linear or cosine: how guidance rises from 1 to its value over the sequence."""
    scales: int = 0
    """Stop after this many scales; 0 samples all. Needs a decoder of prefixes."""
    compile: bool = False
    """Compile the decoding step (GPU)."""
