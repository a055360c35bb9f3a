"""Config section ``tokens``: content and location of the token cache."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("auto", "32", "bf16")
"""Precisions of networks, for every section with that key; ``stages/precision.py`` explains auto."""


@dataclass
class TokensConfig:
    """The token cache between stage 1 and stage 2."""

    path: str = "${run}/tokens"
    """Folder with train/, val/ and manifest.json. For train-prior and eval also a URL or pipe prefix to which their
    names are appended: https://…/tokens, s3://…, gs://…, pipe:ssh host cat /…/tokens."""
    local_gigabytes: float = 20.0
    """For a cache at a URL: maximum size of the folder $OCTAVES_DATA/tokens. A shard that is deleted while a reader has
    it open takes additional disk space until that reader opens its next shard."""
    encode_batch_size: int = 64
    """Images encoded at once. Batches do not cross blocks and the last batch of a block is padded, so this value can
    change the bytes of the cache."""
    blocks_per_shard: int = 16
    """Blocks in one tar. After an interruption, finished shards are kept."""
    permutation_seed: int = 0
    """Seed of the fixed order in which images are stored."""
    precision: str = "auto"
    """Precision of the encoder while caching: auto (bf16 if the hardware supports it natively), 32 or bf16. A resumed
    cache keeps its precision."""
    text_encoder: str = "none"
    """none, words (ids of the most frequent words in the training captions), minilm (a small encoder that installs as
    a package), a folder with a transformers text encoder, or its name on the Hugging Face hub."""
    max_caption_tokens: int = 32
    """Maximum length of captions in tokens of the text encoder, including special tokens. Longer ones are cut."""
    vocabulary_size: int = 8192
    """Number of words for text_encoder=words."""
