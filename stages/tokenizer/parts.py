"""Config dataclasses of the parts of a tokenizer: transformers, quantizers (one per kind) and heads."""

from __future__ import annotations

from dataclasses import dataclass, field

GRADIENT_NAMES = ("straight-through", "rotation")
"""Gradient estimators, which pass the gradient of a code to its encoding."""


@dataclass
class TransformerConfig:
    """Size of an encoder or decoder."""

    depth: int = 8
    """Number of layers."""
    width: int = 512
    """Features of a token."""
    heads: int = 8
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, relative to ``width``."""


@dataclass
class QuantizerConfig:
    """Keys of every quantizer section."""

    kind: str = "cosine"
    """cosine, fsq, lfq, bsq, simvq or residual; determines the other keys of this section."""


@dataclass
class FSQConfig(QuantizerConfig):
    """Finite scalar quantization."""

    kind: str = "fsq"
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    """Number of values of each rounded number. Their product is the number of codes; above 65,536 there are several
    fields."""


@dataclass
class LFQConfig(QuantizerConfig):
    """Lookup-free quantization."""

    kind: str = "lfq"
    bits: int = 18
    """Signs per token, which give 2^bits codes."""
    bits_per_field: int = 16
    """Maximum bits of one field. More bits are split into the fewest fields, as evenly as possible: 18 become 9 and
    9."""
    entropy_group_bits: int = 10
    """Maximum bits in a group; the entropy of mean code usage is computed per group. With 1 every bit is its own group,
    which is BSQ's closed form: it cannot distinguish balanced but identical bits from independent ones. The only
    measurement is one pair of short runs (10 bits, 100 steps on Fashion-MNIST, one seed): 17.3 dB and a perplexity of 8
    with single bits, 19.2 dB and 23 with one group. This is too little to estimate the effect on a full training."""
    temperature: float = 1.0
    """Softness of signs in the entropy term: a number x is positive with probability sigmoid(4 x / temperature)."""


@dataclass
class BSQConfig(LFQConfig):
    """Binary spherical quantization."""

    kind: str = "bsq"


@dataclass
class CodebookConfig(QuantizerConfig):
    """Keys of every quantizer with a codebook."""

    codes: int = 1024
    """Entries of each codebook, at most 65,536. For more codes use several fields (lfq, bsq, residual or fsq)."""
    code_dim: int = 8
    """Width of a code; encodings are projected to it. ViT-VQGAN has 8192 codes of width 32."""
    gradient: str = "straight-through"
    """straight-through, or rotation: the gradient is rotated and scaled by the transformation from code to encoding."""


@dataclass
class LearnedCodebookConfig(CodebookConfig):
    """Keys of every quantizer with a learned codebook."""

    revive_every: int = 20
    """Forward passes between checks for dead codes; 0 never revives codes."""
    revive_below: float = 0.03
    """A code is dead if its average usage is below this fraction of uniform usage."""


@dataclass
class CosineVQConfig(LearnedCodebookConfig):
    """Factorized vector quantization by cosine similarity."""

    kind: str = "cosine"


@dataclass
class ResidualVQConfig(LearnedCodebookConfig):
    """Residual vector quantization."""

    kind: str = "residual"
    depth: int = 2
    """Number of stages; each is a field of the token."""


@dataclass
class SimVQConfig(CodebookConfig):
    """A frozen codebook with a learned linear map."""

    kind: str = "simvq"


@dataclass
class HeadConfig:
    """Keys of every head section."""

    kind: str = "none"
    """none, or wavelet: also decodes at any resolution."""


@dataclass
class WaveletHeadConfig(HeadConfig):
    """Complex wavelets around every cell."""

    kind: str = "wavelet"
    cell: int = 2
    """Side of a cell in pixels of the tokenizer; must divide the patch side."""
    width: int = 48
    """Features of a cell."""
    low_atoms: int = 4
    """Gaussian atoms per side of the square around a cell."""
    rings: int = 3
    """Octaves of carrier frequencies; the highest has a wavelength of two pixels of the tokenizer."""
    hidden: int = 16
    """Complex features per family after mixing the atoms."""
    crop: int = 32
    """Side of training crops in output pixels."""
