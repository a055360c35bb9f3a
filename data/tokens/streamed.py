"""Stream a token cache from a URL during training, through a local folder of bounded size.

Notes:

- The local copy of a shard is named by its sha256 from the manifest, so runs can share copies. The download is hashed
  and renamed when complete. Every process hashes an existing copy before it reads it; a damaged copy is downloaded
  again.
- One process of a machine downloads a shard, the others wait for it. The copies that were opened longest ago are
  deleted first.
- Open copies are memory maps. If one is deleted while a reader has it open, its bytes stay on disk, in addition to the
  limit, until the reader opens its next shard.
- A thread downloads announced shards ahead of time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from data.errors import OctavesError
from data.files import file_sha256, locked, publish, temporary_name
from data.images.home import data_home
from data.remote import RemoteError, attempt, is_remote, parts_of
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest
from data.tokens.reader import ShardsReader, TokenReader
from data.tokens.shards import ShardInfo

GIGABYTE = 10**9
FOLDER = "tokens"
_WAIT_SECONDS = 0.1


class ShardStore:
    """Local copies of shards in ``$OCTAVES_DATA/tokens``, which holds at most ``limit`` bytes over all runs."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.folder = data_home() / FOLDER
        self._sound: set[str] = set()

    def path(self, info: ShardInfo) -> Path:
        """Path of the local copy of a shard, which may not exist."""
        return self.folder / f"{info.sha256}.tar"

    @contextmanager
    def holding(self, url: str, info: ShardInfo) -> Iterator[Path]:
        """Context with the local copy of the shard at ``url``, downloaded if missing or damaged.

        The copy is not deleted inside. Raises CacheError if the download fails or is not the shard of the manifest.
        """
        path = self.path(info)
        self.folder.mkdir(parents=True, exist_ok=True)
        if info.sha256 not in self._sound:
            self._drop_if_damaged(info)
        with locked(_lock(path)) as acquired:
            assert acquired
            if path.is_file():
                os.utime(path)
            else:
                try:
                    attempt(lambda: self._fetch(url, info))
                except RemoteError as error:
                    raise CacheError(f"a shard cannot be downloaded: {error}") from error
            self._sound.add(info.sha256)
            yield path

    def _drop_if_damaged(self, info: ShardInfo) -> None:
        path = self.path(info)

        def damaged() -> bool:
            try:
                return file_sha256(path) != info.sha256
            except FileNotFoundError:
                return False

        if damaged():  # without the lock, so processes can hash an intact copy in parallel
            with locked(_lock(path)):
                if damaged():  # unless another process has replaced it meanwhile
                    path.unlink()

    def _fetch(self, url: str, info: ShardInfo) -> None:
        path = self.path(info)
        for stale in self.folder.glob(f"{path.name}.tmp-*"):  # left by a killed process
            stale.unlink(missing_ok=True)
        temporary = temporary_name(path)
        while not self._reserve(temporary, info.bytes):
            time.sleep(_WAIT_SECONDS)  # wait for downloads of other processes
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("r+b") as file:
                for part in parts_of(url):
                    digest.update(part)
                    size += len(part)
                    if size > info.bytes:
                        break
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if size < info.bytes:
                raise RemoteError(f"{url}: the download has only {size} of {info.bytes} bytes")
            if digest.hexdigest() != info.sha256:
                raise RemoteError(f"{url}: the download is not the shard of the manifest (sha256); upload it again")
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> bool:
        """Create a file of ``size`` bytes, after deleting the oldest copies. False if it still exceeds the limit."""
        with locked(self.folder / "room.lock") as acquired:
            assert acquired
            copies: list[tuple[float, int, Path]] = []
            for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.tar.tmp-*")):
                with suppress(FileNotFoundError):  # renamed or deleted since the glob
                    stat = path.stat()
                    copies.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in copies)
            for _, copy_size, path in sorted(copies):
                if total + size <= self.limit:
                    break
                with locked(_lock(path), wait=False) as acquired:
                    if acquired:
                        path.unlink(missing_ok=True)
                        total -= copy_size
            if total + size > self.limit:
                return False
            with temporary.open("wb") as file:
                file.truncate(size)
            return True


def _lock(path: Path) -> Path:
    """The lock file of a local copy, or of its temporary file."""
    return path.with_name(f"{path.name.partition('.tmp-')[0]}.lock")


class StreamedReader:
    """Random access to one split of a cache at a URL, like ``TokenReader``. Shards are downloaded on first access.

    Pass ``manifest`` if it is already loaded; otherwise it is downloaded immediately. Raises CacheError if the manifest
    or a shard cannot be downloaded, or if a shard is larger than ``limit`` bytes.
    """

    def __init__(self, url: str, split: str, limit: int, manifest: Manifest | None = None) -> None:
        self.url, self.split = url.rstrip("/"), split
        self.manifest = manifest or Manifest.load(url)
        self.layout = self.manifest.layout
        self.shards = self.manifest.split(split).shards
        self.store = ShardStore(limit)
        largest = max((shard.bytes for shard in self.shards), default=0)
        if largest > limit:
            raise CacheError(
                f"tokens.local_gigabytes={limit / GIGABYTE:g}: the largest shard of {url} has {largest / GIGABYTE:.3g} "
                "GB; set it to several times that"
            )
        self._starts = np.cumsum([0, *(shard.count for shard in self.shards)])
        self._open: dict[int, tuple[int | None, ShardsReader]] = {}
        self._announced: SimpleQueue[int] | None = None
        self._coming: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.split, self.store.limit, self.manifest)

    def read(
        self, positions: np.ndarray, views: np.ndarray | int = 0, with_text: bool = False
    ) -> dict[str, np.ndarray]:
        """Like ``ShardsReader.read``."""
        positions = np.asarray(positions, dtype=np.int64)
        if not len(positions) or not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions {positions.min(initial=0)} … {positions.max(initial=0)} of {len(self)}")
        views = np.broadcast_to(np.asarray(views, dtype=np.int64), positions.shape)
        numbers = self._numbers(positions)
        parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            rows = positions[where] - self._starts[number]
            parts.append((where, self._shard(number).read(rows, views[where], with_text)))
        batch = {name: _joined([(where, part[name]) for where, part in parts]) for name in parts[0][1]}
        return {**batch, "index": positions}

    def empty_caption(self) -> np.ndarray:
        """Like ``ShardsReader.empty_caption``."""
        return self._shard(0).empty_caption()

    def keys(self, positions: np.ndarray) -> list[str]:
        """Names of the samples in the image source."""
        numbers = self._numbers(positions)
        return [
            self._shard(number).keys(np.asarray([position - self._starts[number]]))[0]
            for number, position in zip(numbers.tolist(), positions, strict=True)
        ]

    def announce(self, positions: np.ndarray) -> None:
        """Download the shards of these positions in a background thread, since they will be read soon."""
        if self._announced is None:
            self._announced = SimpleQueue()
            threading.Thread(target=self._fetch_announced, args=(self._announced,), daemon=True).start()
        for number in set(self._numbers(positions).tolist()) - self._coming:
            if not self.store.path(self.shards[number]).exists():
                self._coming.add(number)
                self._announced.put(number)

    def _fetch_announced(self, announced: SimpleQueue[int]) -> None:
        while True:
            number = announced.get()
            info = self.shards[number]
            # errors are raised when the shard is read
            with suppress(OctavesError, OSError), self.store.holding(self._url_of(info), info):
                pass
            self._coming.discard(number)

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _url_of(self, info: ShardInfo) -> str:
        return f"{self.url}/{self.split}/{info.file}"

    def _shard(self, number: int) -> ShardsReader:
        if number not in self._open:
            stale = [other for other, (inode, _) in self._open.items() if inode != self._inode(other)]
            for other in stale:  # also copies downloaded again, whose old bytes still take disk space
                del self._open[other]
            info = self.shards[number]
            with self.store.holding(self._url_of(info), info) as path:
                self._open[number] = self._inode(number), ShardsReader(self.manifest, [(path, info)])
        return self._open[number][1]

    def _inode(self, number: int) -> int | None:
        """Inode of the local copy; None if there is none."""
        try:
            return self.store.path(self.shards[number]).stat().st_ino
        except FileNotFoundError:
            return None


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Join parts (row indices, values) into one array, padded with 0 to the largest shape."""
    count = sum(len(rows) for rows, _ in parts)
    shape = np.max([part.shape[1:] for _, part in parts], axis=0).astype(int)
    joined = np.zeros((count, *shape), parts[0][1].dtype)
    for rows, part in parts:
        index: tuple[Any, ...] = (rows, *(slice(size) for size in part.shape[1:]))
        joined[index] = part
    return joined


def open_tokens(
    path: str, split: str, local_gigabytes: float, manifest: Manifest | None = None
) -> TokenReader | StreamedReader:
    """Open one split of a cache in a folder, or at a URL with at most ``local_gigabytes`` in ``$OCTAVES_DATA/tokens``.

    Pass ``manifest`` if it is already loaded. Raises CacheError.
    """
    if is_remote(path):
        return StreamedReader(path, split, int(local_gigabytes * GIGABYTE), manifest)
    return TokenReader(path, split, manifest)
