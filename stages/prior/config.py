"""Config sections of stage 2: ``prior`` (one dataclass per kind), ``prior_training`` and ``sampling``."""

from __future__ import annotations

from dataclasses import dataclass, field

FIXED_ORDERS = ("natural", "reversed", "interleaved", "luma_first", "scale")
"""Orders for layouts of fixed length."""
LIST_ORDERS = ("natural", "luma_first")
"""Orders for lists. natural: the code's own order, coarse to fine; luma_first: plane 0 before the other planes."""
PREFIX_ORDERS = ("natural", "scale")
"""Orders in which the first scales come first: they can be given as a prefix, and sampling can stop after them."""
AVERAGING = ("none", "replace", "mix", "learned")
"""Kinds of moving averages that replace or mix into half of the features between transformer layers."""
AVERAGING_BORDERS = ("sample", "scale", "grid")
"""Borders at which the windows of moving averages stop."""
CONFIDENCE_NOISE = 4.5
"""Choice temperature of MaskGIT's code; the paper gives no value."""


@dataclass
class PriorConfig:
    """Keys common to all priors."""

    kind: str = "transformer"
    """Kind of prior; determines the other keys of this section."""
    path: str = "${run}/prior/prior.safetensors"
    """Exported weights; written by train-prior, read by eval and sample."""


@dataclass
class TransformerPriorConfig(PriorConfig):
    """Decoder-only transformer."""

    kind: str = "transformer"
    depth: int = 12
    """Number of layers."""
    width: int = 768
    """Features per token."""
    heads: int = 12
    """Attention heads; must divide the width."""
    hidden_ratio: float = 8 / 3
    """Hidden width of SwiGLU divided by the width; 8/3 has as many parameters as a plain MLP with ratio 4."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    checkpoint_gradients: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    max_length: int = 4096
    """Maximum number of modeled elements of a stream; longer streams are truncated. Fixed lengths are never cut."""
    context: bool = True
    """Streams: also embed what the grammar knows about the next element, beside its place."""
    order: str = "natural"
    """Order in layouts of fixed length: natural; reversed: from the last element to the first; interleaved: all scales
    of a place together; luma_first: luma scales before chroma scales; scale: whole scales at once
    (``stages/prior/scalewise.py``)."""
    averaging: str = "none"
    """WaveletGPT: between layers, half of the features become moving averages over 2, 4, … slots. none; replace (as in
    the paper); mix (one fifth average, as in replications); learned (learned window weights, one set per length)."""
    averaging_borders: str = "sample"
    """Where windows stop: sample (start of the sequence), scale (start of each scale), or grid (windows are squares in
    the scale's grid)."""
    averaging_longest: int = 0
    """Longest window, in slots or grid cells per side; 0: the longest run of slots between borders."""


@dataclass
class ChunkedPriorConfig(PriorConfig):
    """Encoder and three decoders for lists."""

    kind: str = "chunked"
    width: int = 512
    """Features per element and per patch."""
    heads: int = 8
    """Attention heads; must divide the width."""
    encoder_depth: int = 3
    """Layers of the encoder."""
    channel_depth: int = 3
    """Layers of the channel decoder."""
    position_depth: int = 3
    """Layers of the position decoder."""
    value_depth: int = 5
    """Layers of the value decoder."""
    hidden_ratio: float = 8 / 3
    """Hidden width of SwiGLU divided by the width."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    chunk: int = 896
    """Elements per chunk, which the decoders predict at once; a shorter list is one chunk."""
    overlap: int = 128
    """Elements before the chunk that the decoders also see."""
    patch: int = 2
    """Side of the encoder's patches, in luma blocks."""
    early_bias: float = 1.0
    """Training samples chunk k = 1, 2, … of a list with probability proportional to k^-early_bias; 0: uniformly."""
    order: str = "natural"
    """natural: coarse to fine; luma_first: luma before chroma, for colorization."""


@dataclass
class PriorTrainingConfig:
    """Training of stage 2. Steps are optimizer steps."""

    max_steps: int = 10_000
    """Optimizer steps."""
    batch_size_per_device: int = 64
    """Token sequences per forward pass of one process."""
    bucket_batches: int = 32
    """Streams: number of batches that are drawn together and grouped by length to reduce padding; 1 disables it."""
    shuffle_shards: int = 0
    """Number of shards that are mixed at a time, in a shard order drawn anew each epoch; 0 mixes all shards."""
    accumulate_batches: int = 1
    """Forward passes per optimizer step."""
    precision: str = "auto"
    """auto (bf16 if the hardware supports bf16 multiplication), 32 or bf16; cross entropy stays in float32. A resumed
    run keeps the precision it started with."""
    optimizer: str = "adamw"
    """adamw, or muon: Muon for the matrices in the transformer layers and AdamW for all other parameters."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    matrix_learning_rate: float = 1e-2
    """Peak learning rate of the matrices that Muon updates; learning_rate applies to all other parameters."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    final_learning_rate_share: float = 0.05
    """Cosine decay ends at this fraction of the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's betas."""
    weight_decay: float = 0.05
    """Decoupled weight decay, applied to matrices only."""
    gradient_clip_norm: float = 1.0
    """Maximum gradient norm."""
    ema_decay: float = 0.999
    """EMA decay of the exported weights, with timm's warm-up."""
    log_every: int = 50
    """Steps between log entries."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    validate_every: int = 1_000
    """Steps between validations."""
    validation_samples: int = 2_048
    """Held-out sequences per validation."""


@dataclass
class SamplingConfig:
    """The config section ``sampling``. Lists have one value, or one per scale."""

    temperature: list[float] = field(default_factory=lambda: [1.0])
    """Divides the logits; 0 takes the most probable id. One value or one per scale."""
    top_k: list[int] = field(default_factory=lambda: [0])
    """Keep the k most probable ids; 0 keeps all. One value or one per scale."""
    top_p: list[float] = field(default_factory=lambda: [1.0])
    """Keep the most probable ids up to this probability mass. One value or one per scale."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = unconditional + guidance * (conditional - unconditional); 1 is off."""
    guidance_schedule: str = "constant"
    """constant, linear or cosine: how guidance rises from 1 to its value over the sequence."""
    scales: int = 0
    """Stop after this many scales or bit-planes; 0 samples all. Needs a tokenizer that decodes prefixes."""
    rounds: list[int] = field(default_factory=list)
    """Rounds per scale with prior.order=scale. One value or one per scale; empty: 8, 2, then 1 for all later scales."""
    confidence_noise: float = CONFIDENCE_NOISE
    """prior.order=scale: scale of the Gumbel noise on the confidence that selects elements; decays over the rounds."""
    compile: bool = False
    """Compile the decoding step (GPU)."""
    precision: str = "auto"
    """auto (bf16 if the hardware supports bf16 multiplication), 32 or bf16; applies to tokenizer and prior."""
