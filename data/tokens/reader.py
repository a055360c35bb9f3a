"""Random access to token shards by memory maps. Nothing is unpickled.

Tar members are plain bytes at known offsets. So a shard is mapped once and its arrays are views of the map: the page
cache holds the only copy, shared by all loader processes. Random access needs no decoding; a batch needs one
vectorized gather for each block it contains.
"""

from __future__ import annotations

import io
import json
import mmap
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.files import file_sha256
from data.layout import TokenLayout
from data.tokens.errors import CacheError
from data.tokens.manifest import MEND, Manifest
from data.tokens.shards import ShardInfo

_NPY_HEADER_BYTES = 4096  # longer than any header that octaves writes
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass
class _StoredBlock:
    tokens: np.ndarray
    offsets: np.ndarray | None
    header: np.ndarray | None
    keys: memoryview
    texts: memoryview | None
    captions: np.ndarray | None
    caption_offsets: np.ndarray | None


class ShardsReader:
    """Random access to local shards of a cache. Positions count through the shards in the given order.

    Raises CacheError if a shard is missing, its size differs from the manifest, or a record is invalid.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[tuple[Path, ShardInfo]]) -> None:
        self.manifest = manifest
        self.layout: TokenLayout = manifest.layout
        self._blocks: list[_StoredBlock] = []
        labels: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        for path, shard in shards:
            for members in _index_shard(path, shard):
                block, label, index = self._open_block(members, path)
                self._blocks.append(block)
                labels.append(label)
                indices.append(index)
        self.labels: np.ndarray = np.concatenate([np.empty(0, np.int64), *labels])
        """int64 [N]; -1 for images without a label."""
        self.source_indices: np.ndarray = np.concatenate([np.empty(0, np.int64), *indices])
        """int64 [N]: index of each sample in the image source."""
        self._starts = np.cumsum([0, *(len(label) for label in labels)])[:-1]

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, positions: np.ndarray, views: np.ndarray | int = 0, with_text: bool = False
    ) -> dict[str, np.ndarray]:
        """Samples at ``positions`` [B] in the given views: ids [B, L, F] in the type on disk, label and index [B].

        ``index`` is the position. Layouts of variable length add ``length`` [B], with ids padded with 0 to the longest
        of the batch; layouts with side information add ``header`` [B, S]. ``with_text`` adds encoded captions: text
        [B, T, W] in the type on disk, padded with 0 to the longest of the batch, and text_length [B], 0 for none.

        Raises IndexError for positions out of range, CacheError if captions are requested but were not encoded.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions {positions.min()} … {positions.max()}; the split has {len(self)} samples")
        views = np.broadcast_to(np.asarray(views, dtype=np.int64), positions.shape)
        groups = self._groups(positions)
        batch: dict[str, np.ndarray] = {"label": self.labels[positions], "index": positions}
        if self.layout.ends == "fixed":
            first = self._blocks[0].tokens
            ids = np.empty((len(positions), *first.shape[2:]), first.dtype)
            for block, where, rows in groups:
                ids[where] = block.tokens[rows, views[where]]
            batch["ids"] = ids if ids.ndim == 3 else ids[..., None]
        else:
            batch.update(self._read_ragged(groups, views))
        if self.layout.header:
            header = np.empty((len(positions), len(self.layout.header)), np.int64)
            for block, where, rows in groups:
                assert block.header is not None
                header[where] = block.header[rows, views[where]]
            batch["header"] = header
        if with_text:
            batch.update(self._read_text(groups, len(positions)))
        return batch

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: number of elements of each sample in view 0, for layouts of variable length."""
        num_views = len(self.manifest.views)
        parts = [np.diff(block.offsets)[::num_views] for block in self._blocks if block.offsets is not None]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def empty_caption(self) -> np.ndarray:
        """The encoded empty caption: [t, W] in the type on disk.

        Raises CacheError for a cache without encoded captions.
        """
        captions, offsets = _captions_of(self._blocks[0])
        return captions[: offsets[1]]

    def keys(self, positions: np.ndarray) -> list[str]:
        """Names of the samples in the image source."""
        return [self._json_entry(position, "keys") for position in positions]

    def texts(self, positions: np.ndarray) -> list[str]:
        """Captions of the samples; empty for none."""
        return [self._json_entry(position, "texts") for position in positions]

    def _groups(self, positions: np.ndarray) -> list[tuple[_StoredBlock, np.ndarray, np.ndarray]]:
        """(block, rows in the batch, rows in the block) for every block of the batch."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        rows = (positions - self._starts[numbers])[order] if len(positions) else positions
        borders = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(positions)]
        return [
            (self._blocks[ordered[a]], order[a:b], rows[a:b])
            for a, b in zip(borders, borders[1:], strict=False)
            if a < b
        ]

    def _read_ragged(
        self, groups: list[tuple[_StoredBlock, np.ndarray, np.ndarray]], views: np.ndarray
    ) -> dict[str, np.ndarray]:
        num_views = len(self.manifest.views)
        parts: dict[int, np.ndarray] = {}
        for block, where, rows in groups:
            assert block.offsets is not None
            slots = rows * num_views + views[where]
            for place, start, stop in zip(where, block.offsets[slots], block.offsets[slots + 1], strict=True):
                parts[int(place)] = block.tokens[start:stop]
        lengths = np.asarray([len(parts[place]) for place in range(len(views))], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        ids = np.zeros((len(views), longest, self.layout.num_fields), self._blocks[0].tokens.dtype)
        for place, part in parts.items():
            ids[place, : len(part)] = part
        return {"ids": ids, "length": lengths}

    def _read_text(
        self, groups: list[tuple[_StoredBlock, np.ndarray, np.ndarray]], count: int
    ) -> dict[str, np.ndarray]:
        first, _ = _captions_of(self._blocks[0])
        lengths = np.zeros(count, dtype=np.int64)
        for block, where, rows in groups:
            offsets = _captions_of(block)[1]
            lengths[where] = offsets[rows + 2] - offsets[rows + 1]
        text = np.zeros((count, int(lengths.max(initial=0)), first.shape[1]), first.dtype)
        for block, where, rows in groups:
            captions, offsets = _captions_of(block)
            for place, start, length in zip(where, offsets[rows + 1], lengths[where], strict=True):
                text[place, :length] = captions[start : start + length]
        return {"text": text, "text_length": lengths}

    def _json_entry(self, position: int, name: str) -> str:
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        stored: memoryview | None = getattr(self._blocks[number], name)
        return "" if stored is None else json.loads(bytes(stored))[int(position) - int(self._starts[number])]

    def _open_block(self, members: dict[str, memoryview], path: Path) -> tuple[_StoredBlock, np.ndarray, np.ndarray]:
        try:
            label, index = read_npy(members["label.npy"]), read_npy(members["index.npy"])
            tokens = read_npy(members["tokens.npy"])
            header = read_npy(members["header.npy"]) if self.layout.header else None
            offsets = read_npy(members["offsets.npy"]) if self.layout.ends != "fixed" else None
            captions = caption_offsets = None
            if self.manifest.text is not None:
                captions, caption_offsets = self._open_captions(members, len(label))
            texts = members.get("text.json")
            block = _StoredBlock(tokens, offsets, header, members["keys.json"], texts, captions, caption_offsets)
        except (KeyError, CacheError) as error:
            raise CacheError(f"{path}: a record is foreign or damaged ({error}); delete it and {MEND}") from error
        fields = () if self.layout.num_fields == 1 else (self.layout.num_fields,)
        expected = (len(label), len(self.manifest.views), self.layout.length, *fields)
        if self.layout.ends == "fixed" and tokens.shape != expected:
            raise CacheError(f"{path}: a block has tokens {tokens.shape}, expected {expected}; delete it and {MEND}")
        return block, label, index

    def _open_captions(self, members: dict[str, memoryview], count: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.manifest.text is not None
        captions, offsets = read_npy(members["condition.npy"]), read_npy(members["condition_offsets.npy"])
        width = self.manifest.text["width"] or 1
        if (
            captions.shape[1:] != (width,)
            or offsets.shape != (count + 2,)
            or offsets[0] != 0
            or offsets[-1] != len(captions)
            or (np.diff(offsets) < 0).any()
        ):
            raise CacheError(
                f"captions {captions.shape} of width {width} with {len(offsets)} offsets for {count} samples"
            )
        return captions, offsets


class TokenReader(ShardsReader):
    """Random access to one split of a cache in a folder. Positions 0 … len - 1 count in the stored order.

    Pass ``manifest`` if it is already loaded. Raises the errors of ``ShardsReader``, and CacheError if the number of
    samples differs from the manifest.
    """

    def __init__(self, folder: str | Path, split: str, manifest: Manifest | None = None) -> None:
        self.folder, self.split = Path(folder), split
        manifest = manifest or Manifest.load(folder)
        info = manifest.split(split)
        super().__init__(manifest, [(self.folder / split / shard.file, shard) for shard in info.shards])
        if len(self) != info.count:
            raise CacheError(f"{self.folder / split} holds {len(self)} samples, its manifest says {info.count}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Memory maps cannot be pickled; a spawned loader process opens its own.
        return type(self), (self.folder, self.split, self.manifest)

    def verify(self) -> None:
        """Compare the hash of every shard with the manifest; this reads the whole split. Raises CacheError."""
        for shard in self.manifest.split(self.split).shards:
            path = self.folder / self.split / shard.file
            if file_sha256(path) != shard.sha256:
                raise CacheError(f"{path} is damaged: its sha256 differs from the manifest; delete it and {MEND}")


def _captions_of(block: _StoredBlock) -> tuple[np.ndarray, np.ndarray]:
    if block.captions is None or block.caption_offsets is None:
        raise CacheError(f"the cache has no encoded captions; set tokens.text_encoder and {MEND} in a new RUN=")
    return block.captions, block.caption_offsets


def read_npy(buffer: memoryview) -> np.ndarray:
    """The array of an .npy member as a read-only view of ``buffer``. Raises CacheError. Never unpickles."""
    head = io.BytesIO(buffer[:_NPY_HEADER_BYTES])
    try:
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(head)](head)
        if dtype.hasobject or fortran:
            raise CacheError("an array of objects or in column order; octaves writes and reads neither")
        count = int(np.prod(shape, dtype=np.int64))
        if head.tell() + count * dtype.itemsize != len(buffer):
            raise CacheError("an array with fewer or more bytes than its header says")
        return np.frombuffer(buffer, dtype, count, head.tell()).reshape(shape)
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"not an .npy array ({error})") from error


def _index_shard(path: Path, info: ShardInfo) -> list[dict[str, memoryview]]:
    """The members of each record of a shard, by extension, as views of the memory map."""
    if not path.is_file():
        raise CacheError(f"{path} is missing; {MEND}")
    size = path.stat().st_size
    if size != info.bytes:
        raise CacheError(f"{path} is truncated or foreign: {size} bytes, the manifest says {info.bytes}; {MEND}")
    records: dict[str, dict[str, memoryview]] = {}
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    data = view[member.offset_data : member.offset_data + member.size]
                    records.setdefault(key, {})[extension] = data
        except tarfile.TarError as error:
            raise CacheError(f"{path} is no tar ({error}); delete it and {MEND}") from error
    if len(records) != info.blocks:
        raise CacheError(f"{path} has {len(records)} blocks, the manifest says {info.blocks}; delete it and {MEND}")
    return [records[key] for key in sorted(records)]
