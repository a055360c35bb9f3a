"""Writer of token shards: plain webdataset tars whose records are blocks of samples.

Notes:

- The key of a record is its zero-padded block number. File names as keys would break at the first dot.
- The bytes depend only on the blocks (``mtime=0``, no user, no process id), so runs can be compared by hash.
- A shard gets its final name when it is complete and synced. Its sidecar ``000000.json`` is written after that.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from data.files import file_sha256, publish, temporary_name, write_atomically
from data.layout import TokenLayout
from data.tokens.errors import CacheError

NO_LABEL = -1


@dataclass
class Block:
    """Consecutive samples in stored order: n samples, V views, L elements, F fields, S header fields."""

    number: int
    ids: np.ndarray
    """integers [n, V, L, F]"""
    lengths: np.ndarray
    """integers [n, V]: number of valid elements; the rest is padding."""
    header: np.ndarray
    """integers [n, V, S]"""
    labels: np.ndarray
    """integers [n]; NO_LABEL for none."""
    indices: np.ndarray
    """integers [n]: indices in the image source."""
    keys: list[str] = field(default_factory=list)
    """Names of the samples in the image source."""
    texts: list[str] = field(default_factory=list)
    """Captions; empty for none."""
    captions: list[np.ndarray] = field(default_factory=list)
    """Encoded captions [t, W]: first the empty caption, then each sample, with t = 0 for no caption. Empty list:
    captions are not encoded."""
    captions_cut: int = 0
    """Number of captions that were too long for the text encoder."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Sums of ``Tokens.remarks`` over these samples, in their first view."""


@dataclass(frozen=True)
class ShardInfo:
    """Entry of one shard in its sidecar and in the manifest."""

    file: str
    """Name of the tar in the folder of the split."""
    count: int
    """Number of samples."""
    blocks: int
    """Number of records."""
    bytes: int
    sha256: str
    captions: int
    """Number of samples with a caption."""
    skipped: tuple[str, ...] = ()
    """Keys of unreadable images."""
    captions_cut: int = 0
    """Number of captions that were too long for the text encoder."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Sums of ``Tokens.remarks`` by name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "skipped": list(self.skipped)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardInfo:
        """The inverse of ``to_dict``. Raises TypeError or KeyError for invalid data."""
        return cls(**{**data, "skipped": tuple(data["skipped"])})


def total_remarks(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums of remarks by name. Names with a sum of 0 are kept."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:06d}.tar"


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds ids below ``vocabulary_size``. Raises CacheError above 2^32."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocabulary_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise CacheError(f"a vocabulary of {vocabulary_size} does not fit 32 bits; use several fields")


class ShardWriter:
    """Writes one shard. Use it as a context manager: without ``commit``, no file is left."""

    def __init__(self, folder: Path, number: int, layout: TokenLayout) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / shard_name(number)
        self._temporary = temporary_name(self._path)
        self._layout = layout
        self._limits = _limits(layout)
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, encoder=False, compress=False, mtime=0)
        self._count = self._blocks = self._captions = self._captions_cut = 0
        self._remarks: Counter[str] = Counter()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, block: Block) -> None:
        """Append a block. Raises CacheError for ids or lengths that the layout does not allow."""
        self._tar.write({"__key__": f"{block.number:08d}", **self._members(block)})
        self._count += len(block.labels)
        self._blocks += 1
        self._captions += sum(map(bool, block.texts))
        self._captions_cut += block.captions_cut
        self._remarks.update(block.remarks)

    def commit(self, skipped: list[str]) -> ShardInfo:
        """Rename the shard to its final name, then write its sidecar. ``skipped`` are keys of unreadable images."""
        self._tar.close()
        self._file.flush()
        # fsync before the rename: the final name must never refer to bytes that are not on disk yet.
        os.fsync(self._file.fileno())
        self._file.close()
        info = ShardInfo(
            file=self._path.name,
            count=self._count,
            blocks=self._blocks,
            bytes=self._temporary.stat().st_size,
            sha256=file_sha256(self._temporary),
            captions=self._captions,
            skipped=tuple(skipped),
            captions_cut=self._captions_cut,
            remarks=dict(self._remarks),
        )
        publish(self._temporary, self._path)
        write_atomically(self._path.with_suffix(".json"), to_json(info.to_dict()))
        return info

    def abort(self) -> None:
        """Delete the unfinished shard. Does nothing after a commit."""
        try:
            if not self._file.closed:
                # on a full disk, closing the tar fails too
                with suppress(OSError):
                    self._tar.close()
                with suppress(OSError):
                    self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _members(self, block: Block) -> dict[str, bytes]:
        ids = np.asarray(block.ids)
        valid = np.arange(ids.shape[2]) < block.lengths[..., None]
        wrong = ((ids < 0) | (ids >= self._limits[: ids.shape[2]])).any(axis=-1) & valid
        if wrong.any():
            sample, view, element = (int(i) for i in np.argwhere(wrong)[0])
            raise CacheError(
                f"block {block.number}: ids {ids[sample, view, element].tolist()} of element {element} of image "
                f"{block.keys[sample]} are outside the vocabulary; the tokenizer contradicts its own layout"
            )
        ids = ids.astype(token_dtype(self._layout.max_vocabulary_size))
        members: dict[str, bytes] = {}
        if self._layout.ends == "fixed":
            if not valid.all() or ids.shape[2] != self._layout.length:
                raise CacheError(f"block {block.number}: a layout that ends 'fixed' has samples of another length")
            members["tokens.npy"] = to_npy(ids[..., 0] if ids.shape[3] == 1 else ids)
        else:
            members["tokens.npy"] = to_npy(ids[valid])
            members["offsets.npy"] = to_npy(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int64))
        if self._layout.header:
            vocabulary = max(part.vocabulary_size for part in self._layout.header)
            members["header.npy"] = to_npy(block.header.astype(token_dtype(vocabulary)))
        members["label.npy"] = to_npy(block.labels.astype(np.int64))
        members["index.npy"] = to_npy(block.indices.astype(np.int64))
        members["keys.json"] = to_json(block.keys)
        if any(block.texts):
            members["text.json"] = to_json(block.texts)
        if block.captions:
            lengths = [len(caption) for caption in block.captions]
            members["condition.npy"] = to_npy(np.concatenate(block.captions))
            members["condition_offsets.npy"] = to_npy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        return members


def finished_shard(folder: Path, number: int) -> ShardInfo | None:
    """Entry of a finished shard from its sidecar; None if the shard is missing or damaged and must be written."""
    path = folder / shard_name(number)
    try:
        info = ShardInfo.from_dict(json.loads(path.with_suffix(".json").read_bytes()))
        intact = path.stat().st_size == info.bytes and file_sha256(path) == info.sha256
        return info if intact else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file. Raises ValueError for arrays of objects, which need pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_json(data: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _limits(layout: TokenLayout) -> np.ndarray:
    """Vocabulary size of each field at each element: int64 [L, F], or [1, F] if elements have no fixed scale."""
    if layout.ends != "fixed":
        sizes = [[part.vocabulary_size for part in scale.fields] for scale in layout.scales]
        return np.max(np.asarray(sizes, dtype=np.int64), axis=0, keepdims=True)
    rows = [[part.vocabulary_size for part in scale.fields] for scale in layout.scales for _ in range(scale.length)]
    return np.asarray(rows, dtype=np.int64)
