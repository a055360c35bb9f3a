"""What a tokenizer is made of, as far as its config says: transformers, quantiser (one dataclass a kind), head."""

from __future__ import annotations

from dataclasses import dataclass, field

GRADIENT_NAMES = ("straight-through", "rotation")
"""How the gradient of a chosen code may reach the encoding that it was chosen for."""


@dataclass
class TransformerConfig:
    """Size of an encoder or decoder."""

    depth: int = 8
    """Layers."""
    width: int = 512
    """Features of a token."""
    heads: int = 8
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""


@dataclass
class QuantizerConfig:
    """What every quantiser's section has."""

    kind: str = "cosine"
    """cosine, fsq, lfq, bsq, simvq or residual; picks the other keys of this section."""


@dataclass
class FSQConfig(QuantizerConfig):
    """Finite scalar quantisation."""

    kind: str = "fsq"
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    """Values of each rounded number; their product is the number of codes. More than 65,536 are several fields."""


@dataclass
class LFQConfig(QuantizerConfig):
    """Lookup-free quantisation."""

    kind: str = "lfq"
    bits: int = 18
    """Signs of a token: 2^bits codes."""
    bits_per_field: int = 16
    """Most bits of one field; more are cut into the fewest fields, as even as can be: 18 are 9 and 9."""
    entropy_group_bits: int = 10
    """Most bits over whose codes the entropy of their mean use is taken. 1, every bit for itself, is BSQ's closed form:
    it does not tell bits that are balanced but all equal from independent ones. One pair of short runs is all that was
    seen of it (10 bits, 100 steps on Fashion-MNIST, one seed: 17.3 dB and a perplexity of 8 by single bits, 19.2 dB and
    23 as one group), too little to say how much it costs a whole training."""
    temperature: float = 1.0
    """How soft the entropy term takes a sign: a number x is positive with probability sigmoid(4 x / temperature)."""


@dataclass
class BSQConfig(LFQConfig):
    """Binary spherical quantisation."""

    kind: str = "bsq"


@dataclass
class CodebookConfig(QuantizerConfig):
    """What every quantiser with a codebook has."""

    codes: int = 1024
    """Entries of each codebook, 65,536 at most: more codes are several fields (lfq, bsq, residual or fsq)."""
    code_dim: int = 8
    """Width of a code; encodings are projected to it. ViT-VQGAN has 8192 codes of 32."""
    gradient: str = "straight-through"
    """straight-through, or rotation: the gradient is turned and scaled like the code into its encoding."""


@dataclass
class LearnedCodebookConfig(CodebookConfig):
    """What every quantiser with a codebook of learned rows has."""

    revive_every: int = 20
    """Forward passes between two looks for dead codes; 0 never revives."""
    revive_below: float = 0.03
    """A code is dead when its averaged use falls below this share of an equal share."""


@dataclass
class CosineVQConfig(LearnedCodebookConfig):
    """Factorised vector quantisation by cosine similarity."""

    kind: str = "cosine"


@dataclass
class ResidualVQConfig(LearnedCodebookConfig):
    """Residual vector quantisation."""

    kind: str = "residual"
    depth: int = 2
    """Stages; each is a field of the token."""


@dataclass
class SimVQConfig(CodebookConfig):
    """A frozen codebook under a learned linear map."""

    kind: str = "simvq"


@dataclass
class HeadConfig:
    """What every head's section has."""

    kind: str = "none"
    """none, or wavelet: pixels at any resolution too."""


@dataclass
class WaveletHeadConfig(HeadConfig):
    """Complex wavelets around every cell."""

    kind: str = "wavelet"
    cell: int = 2
    """Side of a cell in the tokenizer's own pixels; divides its patches."""
    width: int = 48
    """Features of a cell."""
    low_atoms: int = 4
    """Gaussian atoms along each side of a cell's surroundings."""
    rings: int = 3
    """Octaves of carriers, down from one wave in two of the tokenizer's own pixels."""
    hidden: int = 16
    """Complex features of each family behind its atoms."""
    crop: int = 32
    """Side of the crops that it is trained on, in output pixels."""
