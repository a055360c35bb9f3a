"""Quantisers behind one interface: features → ids → features.

What is notable here:

- codebooks that are learned: ``CosineVQ`` (ViT-VQGAN), ``ResidualVQ`` (several, each codes what is left); codes that
  die are revived. One that is frozen and moves as a whole: ``SimVQ``;
- no codebook to collapse: ``FSQ`` rounds each of a few bounded numbers, ``LFQ`` and ``BSQ`` take their signs;
- large vocabularies are several fields of an element (lfq, bsq, fsq, residual): 2^18 codes are two softmaxes of 2^9. A
  codebook has 2^16 codes at most;
- all work in float32, whatever autocast says and without TF32 (bfloat16 cannot tell 257 codes apart), and are bit-equal
  on all ranks.
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
