"""Quantizers with a common interface: features → ids → features.

- ``CosineVQ`` (ViT-VQGAN) and ``ResidualVQ`` (several codebooks, each for the residual of the previous one) have
  learned codebooks and revive dead codes. ``SimVQ`` has a frozen codebook with a learned linear map.
- ``FSQ`` rounds a few bounded numbers; ``LFQ`` and ``BSQ`` take their signs. They have no codebook that can collapse.
- Large vocabularies are split into several fields of an element (lfq, bsq, fsq, residual): 2^18 codes become two
  softmaxes of 2^9. A codebook has at most 2^16 codes.
- All quantizers compute in float32, even under autocast, and without TF32 (bfloat16 cannot distinguish 257 codes). They
  are bitwise equal on all ranks.
"""

from stages.tokenizer.parts import (
    BSQConfig,
    CosineVQConfig,
    FSQConfig,
    LFQConfig,
    QuantizerConfig,
    ResidualVQConfig,
    SimVQConfig,
)
from stages.tokenizer.quantizers.binary import BSQ, LFQ
from stages.tokenizer.quantizers.cosine import CosineVQ
from stages.tokenizer.quantizers.fsq import FSQ
from stages.tokenizer.quantizers.quantizer import Quantized, Quantizer
from stages.tokenizer.quantizers.residual import ResidualVQ
from stages.tokenizer.quantizers.simvq import SimVQ

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "BSQConfig",
    "CosineVQ",
    "CosineVQConfig",
    "FSQConfig",
    "LFQConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualVQ",
    "ResidualVQConfig",
    "SimVQ",
    "SimVQConfig",
]
