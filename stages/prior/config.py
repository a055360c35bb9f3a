"""Stage 2's config sections: ``prior`` (one dataclass a kind) and ``prior_training``."""

from __future__ import annotations

from dataclasses import dataclass, field

FIXED_ORDERS = ("natural", "reversed", "interleaved", "luma_first", "scale")
"""Orders of layouts of fixed length."""
PREFIX_ORDERS = ("natural", "scale")
"""Orders in which the first scales come first: they may be given, and a prior may stop after them."""
AVERAGING = ("none", "replace", "mix", "learned")
"""What may happen to half of the coordinates between a transformer's layers."""
AVERAGING_BORDERS = ("sample", "scale", "grid")
"""Where the windows of moving averages may stop."""


@dataclass
class PriorConfig:
    """What every prior's section has."""

    kind: str = "transformer"
    """Which prior; picks the other keys of this section."""
    path: str = "${run}/prior/prior.safetensors"
    """Exported weights: written by train-prior, read by eval and sample."""


@dataclass
class PriorTrainingConfig:
    """Training of stage 2. Steps are optimiser steps."""

    max_steps: int = 10_000
    """Updates."""
    batch_size_per_device: int = 64
    """Token sequences in one forward pass of one process."""
    bucket_batches: int = 32
    """Streams: so many batches are drawn together and dealt out by length, so that less is padding; 1 for none."""
    shuffle_shards: int = 0
    """Samples are mixed from so many shards at a time, in an order of shards that every epoch draws; 0: from all."""
    accumulate_batches: int = 1
    """Forward passes per update."""
    precision: str = "auto"
    """auto (bf16 where the hardware multiplies it), 32 or bf16; the cross entropy stays in float32. A run goes on in
    what it began with."""
    learning_rate: float = 1e-3
    """Peak."""
    warmup_steps: int = 200
    """Linear rise of the rate."""
    final_learning_rate_share: float = 0.05
    """Cosine decay ends at this share of the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's averaging factors."""
    weight_decay: float = 0.05
    """Decoupled, on matrices only."""
    gradient_clip_norm: float = 1.0
    """Clip of the gradient norm."""
    ema_decay: float = 0.999
    """Averaging of the exported weights, with timm's warm-up."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    validate_every: int = 1_000
    """Steps between validations."""
    validation_samples: int = 2_048
    """Held-out sequences in one validation."""
