"""Reading a token cache at a URL while training, through a bounded number of bytes on this machine.

What is notable here:

- a shard's copy is named by the sha256 that the manifest gives it, so it is the right one or not there, whoever fetched
  it for which run; it is checked while it comes, and published whole; every process hashes a copy that it finds before
  it reads it, and a damaged one comes again;
- one process of a machine fetches a shard, the others wait for it; the copies that were opened longest ago make room;
- a copy that is open is mapped: it may be removed under a reader, and its bytes stay on the disk, beside the limit,
  until the reader lets go of it at the next shard it opens;
- shards that are announced come in a thread, before anybody waits for them.
"""

from __future__ import annotations

import fcntl
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
from data.files import file_sha256, publish, temporary_name
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
    """Copies of shards in ``$OCTAVES_DATA/tokens``: that folder holds at most ``limit`` bytes, whichever runs fetch."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.folder = data_home() / FOLDER
        self._sound: set[str] = set()

    def path(self, info: ShardInfo) -> Path:
        """Where a shard's copy lies, or would lie."""
        return self.folder / f"{info.sha256}.tar"

    @contextmanager
    def holding(self, url: str, info: ShardInfo) -> Iterator[Path]:
        """The shard at ``url`` on this machine, fetched where it is not there or damaged; inside, nobody removes it.

        Raises CacheError where it does not come, or is not the one that the manifest names.
        """
        path = self.path(info)
        self.folder.mkdir(parents=True, exist_ok=True)
        if info.sha256 not in self._sound:
            self._drop_if_damaged(info)
        with _locked(path) as free:
            assert free
            if path.is_file():
                os.utime(path)
            else:
                try:
                    attempt(lambda: self._fetch(url, info))
                except RemoteError as error:
                    raise CacheError(f"a shard does not come: {error}") from error
            self._sound.add(info.sha256)
            yield path

    def _drop_if_damaged(self, info: ShardInfo) -> None:
        path = self.path(info)

        def damaged() -> bool:
            try:
                return file_sha256(path) != info.sha256
            except FileNotFoundError:
                return False

        if damaged():  # without the lock: the processes of a machine hash a sound copy side by side
            with _locked(path):
                if damaged():  # nobody has put a sound one there meanwhile
                    path.unlink()

    def _fetch(self, url: str, info: ShardInfo) -> None:
        path = self.path(info)
        for stale in self.folder.glob(f"{path.name}.tmp-*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        temporary = temporary_name(path)
        while not self._reserve(temporary, info.bytes):
            time.sleep(_WAIT_SECONDS)  # for other processes that are fetching
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
                raise RemoteError(f"{url}: only {size} of {info.bytes} bytes came")
            if digest.hexdigest() != info.sha256:
                raise RemoteError(f"{url}: what came is not the shard that the manifest names (sha256); copy it again")
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> bool:
        """Make a file of ``size`` bytes where the limit allows that, after older copies have made room."""
        with _locked(self.folder / "room") as free:
            assert free
            kept: list[tuple[float, int, Path]] = []
            for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.tar.tmp-*")):
                with suppress(FileNotFoundError):  # published in this moment
                    stat = path.stat()
                    kept.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in kept)
            for _, freed, path in sorted(kept):
                if total + size <= self.limit:
                    break
                with _locked(path.with_name(path.name.partition(".tmp-")[0]), wait=False) as free:
                    if free:
                        path.unlink(missing_ok=True)
                        total -= freed
            if total + size > self.limit:
                return False
            with temporary.open("wb") as file:
                file.truncate(size)
            return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``path``; False inside where another process has it and nobody waits."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a loader process that was forked meanwhile has this file open, too


class StreamedReader:
    """Random access to one split of a cache at a URL: what ``TokenReader`` gives, shard by shard as they are asked for.

    ``manifest`` is the one at the URL, where it has been read; otherwise it comes at once. Raises CacheError where it
    or a shard does not come.
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
        """Names of the samples in their source."""
        numbers = self._numbers(positions)
        return [
            self._shard(number).keys(np.asarray([position - self._starts[number]]))[0]
            for number, position in zip(numbers.tolist(), positions, strict=True)
        ]

    def announce(self, positions: np.ndarray) -> None:
        """Let the shards of these positions come in a thread, for they will be read soon."""
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
            # whoever reads it says why it does not come
            with suppress(OctavesError, OSError), self.store.holding(self._url_of(info), info):
                pass
            self._coming.discard(number)

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _url_of(self, info: ShardInfo) -> str:
        return f"{self.url}/{self.split}/{info.file}"

    def _shard(self, number: int) -> ShardsReader:
        if number not in self._open:
            gone = [other for other, (inode, _) in self._open.items() if inode != self._inode(other)]
            for other in gone:  # also one that has come again: its name is there, its old bytes still take room
                del self._open[other]
            info = self.shards[number]
            with self.store.holding(self._url_of(info), info) as path:
                self._open[number] = self._inode(number), ShardsReader(self.manifest, [(path, info)])
        return self._open[number][1]

    def _inode(self, number: int) -> int | None:
        """Of the copy that lies here; None where there is none."""
        try:
            return self.store.path(self.shards[number]).stat().st_ino
        except FileNotFoundError:
            return None


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """One array of rows that come in parts (their places, values), padded with 0 to the largest."""
    count = sum(len(where) for where, _ in parts)
    shape = np.max([part.shape[1:] for _, part in parts], axis=0).astype(int)
    joined = np.zeros((count, *shape), parts[0][1].dtype)
    for where, part in parts:
        index: tuple[Any, ...] = (where, *(slice(size) for size in part.shape[1:]))
        joined[index] = part
    return joined


def open_tokens(
    path: str, split: str, local_gigabytes: float, manifest: Manifest | None = None
) -> TokenReader | StreamedReader:
    """One split of the cache in a folder, or at a URL through at most ``local_gigabytes`` in ``$OCTAVES_DATA/tokens``.

    ``manifest`` is the cache's, where it has been read. Raises CacheError.
    """
    if is_remote(path):
        return StreamedReader(path, split, int(local_gigabytes * GIGABYTE), manifest)
    return TokenReader(path, split, manifest)
