"""Stage 2's config sections: ``prior`` (one dataclass a kind), ``prior_training`` and ``sampling``."""

from __future__ import annotations

from dataclasses import dataclass, field

FIXED_ORDERS = ("natural", "reversed", "interleaved", "luma_first", "scale")
"""Orders of layouts of fixed length."""
LIST_ORDERS = ("natural", "luma_first")
"""Orders of lists. natural: as the code has it, coarse to fine; luma_first: all of plane 0 before the other planes."""
PREFIX_ORDERS = ("natural", "scale")
"""Orders in which the first scales come first: they may be given, and a prior may stop after them."""
AVERAGING = ("none", "replace", "mix", "learned")
"""What may happen to half of the coordinates between a transformer's layers."""
AVERAGING_BORDERS = ("sample", "scale", "grid")
"""Where the windows of moving averages may stop."""
CONFIDENCE_NOISE = 4.5
"""MaskGIT's choice temperature, as its code has it; the paper names no number."""


@dataclass
class PriorConfig:
    """What every prior's section has."""

    kind: str = "transformer"
    """Which prior; picks the other keys of this section."""
    path: str = "${run}/prior/prior.safetensors"
    """Exported weights: written by train-prior, read by eval and sample."""


@dataclass
class TransformerPriorConfig(PriorConfig):
    """Decoder-only transformer."""

    kind: str = "transformer"
    depth: int = 12
    """Layers."""
    width: int = 768
    """Features of a token."""
    heads: int = 12
    """Attention heads; must divide the width."""
    hidden_ratio: float = 8 / 3
    """Hidden width of SwiGLU over the width; 8/3 has the parameters of a plain MLP of 4."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    checkpoint_gradients: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    max_length: int = 4096
    """Elements of a stream that are modelled, a beginning where it is longer; a fixed length is always whole."""
    context: bool = True
    """Streams: tell each slot what the grammar knows of the next place, beside the place itself."""
    order: str = "natural"
    """In layouts of fixed length: natural; reversed: from the last element to the first; interleaved: all scales of a
    place together; luma_first: scales of luma before those of chroma; scale: whole scales at once
    (``stages/prior/scalewise.py``)."""
    averaging: str = "none"
    """WaveletGPT: between layers half of the coordinates become moving averages over 2, 4, … slots. none; replace (the
    paper's); mix (a fifth of the average, as replications did); learned (weighted windows, one for each length)."""
    averaging_borders: str = "sample"
    """Where windows stop: sample (beginning of the sequence), scale (of each scale), or grid (squares of its grid)."""
    averaging_longest: int = 0
    """Longest window, in slots or along a grid's side; 0: as long as the longest run of slots between borders."""


@dataclass
class ChunkedPriorConfig(PriorConfig):
    """Encoder and three decoders over lists."""

    kind: str = "chunked"
    width: int = 512
    """Features of an element and of a patch."""
    heads: int = 8
    """Attention heads; must divide the width."""
    encoder_depth: int = 3
    """Layers of the encoder."""
    channel_depth: int = 3
    """Layers of the decoder of channels."""
    position_depth: int = 3
    """Layers of the decoder of positions."""
    value_depth: int = 5
    """Layers of the decoder of values."""
    hidden_ratio: float = 8 / 3
    """Hidden width of SwiGLU over the width."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    chunk: int = 896
    """Elements that the decoders predict at once; lists that are shorter are one chunk."""
    overlap: int = 128
    """Elements before the chunk that the decoders see besides."""
    patch: int = 2
    """Side of the encoder's patches in blocks of luma."""
    early_bias: float = 1.0
    """Training takes chunk k = 1, 2, … of a list with probability proportional to k^-early_bias; 0: each as often."""
    order: str = "natural"
    """natural: coarse to fine; luma_first: all of luma before chroma, for colouring."""


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
    optimizer: str = "adamw"
    """adamw, or muon, which is Muon for the matrices in the transformer's layers and AdamW for all else."""
    learning_rate: float = 1e-3
    """Peak."""
    matrix_learning_rate: float = 1e-2
    """Peak, of the matrices that Muon updates; learning_rate is that of all else."""
    warmup_steps: int = 200
    """Linear rise of the rates."""
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


@dataclass
class SamplingConfig:
    """How tokens are drawn: one config section, ``sampling``. Lists have one value, or one per scale."""

    temperature: list[float] = field(default_factory=lambda: [1.0])
    """Divides the logits; 0 takes the most probable id. One value or one per scale."""
    top_k: list[int] = field(default_factory=lambda: [0])
    """Keep the k most probable ids; 0 keeps all. One value or one per scale."""
    top_p: list[float] = field(default_factory=lambda: [1.0])
    """Keep the most probable ids up to this mass. One value or one per scale."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = unconditional + guidance * (conditional - unconditional); 1 is off."""
    guidance_schedule: str = "constant"
    """constant, linear or cosine: how guidance rises from 1 to its value over the sequence."""
    scales: int = 0
    """Stop after this many scales, or bit-planes; 0 samples all. Needs a decoder of prefixes."""
    rounds: list[int] = field(default_factory=list)
    """Rounds in which prior.order=scale writes a scale. One value or one per scale; empty: 8, 2, then 1 for each."""
    confidence_noise: float = CONFIDENCE_NOISE
    """prior.order=scale: Gumbel noise on the confidence that decides which elements stay, less from round to round."""
    compile: bool = False
    """Compile the decoding step (GPU)."""
    precision: str = "auto"
    """auto (bf16 where the hardware multiplies it), 32 or bf16: of tokenizer and prior while they are used."""
