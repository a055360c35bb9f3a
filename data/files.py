"""Atomic file writes, file locks and file hashes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from multiprocessing.util import register_after_fork
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write to a temporary file in the same folder and rename it, so that a reader sees the whole file or none."""
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Temporary name under which this process writes ``path`` until it is complete."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed processes in ``folder`` and its subfolders.

    No other process may write there at the same time.
    """
    for pattern in ("*.tmp-*", "*/*.tmp-*"):
        for stale in folder.glob(pattern):
            stale.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Rename a synced file to its final name and sync the folder, so that the name survives a power failure."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path`` (flock). Yields False if another process holds it and ``wait`` is False.

    The lock ends with the process that took it, however that ends. Loader processes forked from it do not keep it.
    """
    with path.open("w") as lock:
        register_after_fork(lock, TextIOWrapper.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
