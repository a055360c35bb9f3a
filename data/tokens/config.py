"""What the token cache holds and where it lies: one config section, ``tokens``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokensConfig:
    """The token cache between the stages."""

    path: str = "${run}/tokens"
    """Folder with train/, val/ and manifest.json."""
    encode_batch_size: int = 64
    """Images encoded at once; cut inside a block, the last one padded, so it is part of the bytes' identity."""
    blocks_per_shard: int = 16
    """Blocks in one tar; the unit of work that survives a kill."""
    permutation_seed: int = 0
    """Seed of the fixed order in which images are stored."""
    precision: str = "32"
    """32 or bf16: the encoder's precision while caching."""
