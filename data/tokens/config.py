"""What the token cache holds and where it lies: one config section, ``tokens``."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("auto", "32", "bf16")
"""Of networks, in every section that has the key; ``stages/precision.py`` says what auto is."""


@dataclass
class TokensConfig:
    """The token cache between the stages."""

    path: str = "${run}/tokens"
    """Folder with train/, val/ and manifest.json; for train-prior and eval also a URL or pipe that ends where these
    begin: https://…/tokens, s3://…, gs://…, pipe:ssh host cat /…/tokens."""
    local_gigabytes: float = 20.0
    """Of a cache at a URL: most that the folder $OCTAVES_DATA/tokens holds. A shard that has made room there while a
    reader had it open stays on the disk besides, until that reader opens its next shard."""
    encode_batch_size: int = 64
    """Images encoded at once; cut inside a block, the last one padded, so it is part of the bytes' identity."""
    blocks_per_shard: int = 16
    """Blocks in one tar; the unit of work that survives a kill."""
    permutation_seed: int = 0
    """Seed of the fixed order in which images are stored."""
    precision: str = "auto"
    """auto (bf16 where the hardware multiplies it), 32 or bf16: the encoder's precision while caching. A cache goes on
    in what it began with."""
    text_encoder: str = "none"
    """none, words (ids of the training captions' most frequent words), minilm (a small encoder that installs as a
    package), a folder with a transformers text encoder, or its name on the Hugging Face hub."""
    max_caption_tokens: int = 32
    """Length at which captions are cut, in the text encoder's tokens, special ones included."""
    vocabulary_size: int = 8192
    """Words that the encoder words knows."""
