"""Local copies of shards at a URL or behind a pipe (``data/remote.py``).

The copies are in ``$OCTAVES_DATA/shards``, named by a hash of the URL. Each machine downloads a shard once, for all its
processes. If a shard changes at its URL, delete the copy.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

from data.files import locked, publish, temporary_name
from data.images.home import data_home
from data.images.source import ImagesError
from data.remote import RemoteError, parts_of


def local_copy(url: str) -> Path:
    """The local copy of the shard at ``url``, downloaded if missing. Raises ImagesError."""
    folder = data_home() / "shards"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):  # another process may be downloading it
        if not path.is_file():
            for stale in folder.glob(f"{path.name}.tmp-*"):  # left by a killed process
                stale.unlink()
            fetch(url, path)
    return path


def fetch(url: str, path: Path) -> None:
    """Download ``url`` to ``path``. On failure ``path`` does not exist.

    Raises ImagesError if the download fails or is no complete tar, OSError for errors of the local disk.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            for part in parts_of(url):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        with tarfile.open(temporary, "r:") as tar:
            tar.getmembers()
        publish(temporary, path)
    except RemoteError as error:
        raise ImagesError(str(error)) from error
    except tarfile.TarError as error:
        raise ImagesError(f"{url}: the download is no complete, uncompressed tar ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
