"""text-tokens: write the bytes of a text as a token cache, to study priors that were proposed for text.

There is no tokenizer: each byte is an element, and a sample is a piece of fixed length. The last pieces are held out
for validation. A prior is trained on this cache as on any other (with condition.kind=none).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data.layout import Field, Scale, TokenLayout
from data.tokens import order
from data.tokens.errors import CacheError
from data.tokens.manifest import FILE, Manifest, SplitInfo
from data.tokens.shards import NO_LABEL, Block, ShardInfo, ShardWriter
from pipeline.config import Config, check_command
from pipeline.errors import RunError
from pipeline.own_keys import TextTokensRequest
from pipeline.run import stage_folder


def text_layout(length: int) -> TokenLayout:
    """Layout of one scale with ``length`` bytes."""
    return TokenLayout((Scale("text", length, None, 0, (Field("byte", 256),), (1, length)),))


def cache_text(config: Config, request: TextTokensRequest) -> Path:
    """Write the cache to ``config.tokens.path`` and return that folder.

    Raises ConfigError for a URL, RunError for a text that is missing or too short, CacheError if a cache exists there.
    """
    check_command("text-tokens", config)
    path, folder = Path(request.file).expanduser(), Path(config.tokens.path)
    if not request.file or not path.is_file():
        raise RunError(f"file={request.file}: no such file; give a text file")
    if request.length < 2 or not 0 < request.held_out < 1:
        raise RunError(
            f"length={request.length}, held_out={request.held_out:g}; allowed: 2 bytes or more, and a "
            "fraction between 0 and 1"
        )
    content = path.read_bytes()
    count = len(content) // request.length
    val = int(count * request.held_out)
    if not val or val == count:
        raise RunError(f"{path} has {len(content)} bytes: too few for training and held-out pieces of {request.length}")
    with stage_folder(folder, config, "tokens"):
        if (folder / FILE).exists():
            raise CacheError(f"{folder} already contains a token cache; choose another RUN=, or delete the folder")
        pieces = np.frombuffer(content[: count * request.length], np.uint8).reshape(count, request.length)
        layout, identity = text_layout(request.length), hashlib.sha256(content).hexdigest()
        splits = {"train": pieces[: count - val], "val": pieces[count - val :]}
        manifest = Manifest(
            tokenizer_sha256=identity,
            tokenizer_kind="bytes",
            tokenizer_config={},
            layout=layout,
            image_size=layout.image_size,
            channels=1,
            views=("identity",),
            permutation_seed=config.tokens.permutation_seed,
            encode_batch_size=1,
            precision="32",
            class_names=(),
            splits={name: write_split(folder / name, part, layout, config, identity) for name, part in splits.items()},
        )
        manifest.save(folder)
        print(f"{folder}: {count - val} train, {val} val pieces of {request.length} bytes")
        return folder


def write_split(folder: Path, pieces: np.ndarray, layout: TokenLayout, config: Config, identity: str) -> SplitInfo:
    """Write all pieces, uint8 [n, length], as one shard in the permuted order of the cache."""
    places, size = order.source_order(len(pieces), config.tokens.permutation_seed), order.block_size(len(pieces))
    with ShardWriter(folder, 0, layout) as writer:
        for number, start in enumerate(range(0, len(places), size)):
            indices = places[start : start + size]
            ids = pieces[indices][:, None, :, None].astype(np.int64)
            lengths, header = np.full(ids.shape[:2], ids.shape[2]), np.zeros((*ids.shape[:2], 0), np.int64)
            labels = np.full(len(indices), NO_LABEL)
            writer.write(Block(number, ids, lengths, header, labels, indices, [f"piece {place}" for place in indices]))
        shard: ShardInfo = writer.commit([])
    return SplitInfo(len(pieces), 0, 0, size, identity, (shard,))
