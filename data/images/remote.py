"""Shards at a URL or behind a pipe (``data/remote.py``), copied here once.

The copies lie in ``$OCTAVES_DATA/shards`` under a hash of the URL, so each machine fetches a shard once, whichever of
its processes asks first. Who changed a shard deletes its copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tarfile
from pathlib import Path

from data.files import publish, temporary_name
from data.images.home import data_home
from data.images.source import ImagesError
from data.remote import RemoteError, parts_of


def local_copy(url: str) -> Path:
    """The shard at ``url`` on this machine, fetched where it is not there yet. Raises ImagesError."""
    folder = data_home() / "shards"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching it
        if not path.is_file():
            for stale in folder.glob(f"{path.name}.tmp-*"):  # of a process that was killed
                stale.unlink()
            fetch(url, path)
    return path


def fetch(url: str, path: Path) -> None:
    """Copy what is at ``url`` to ``path``, which is a whole tar or not there.

    Raises ImagesError for what does not come or is no tar, OSError where the local disk is at fault.
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
        raise ImagesError(f"{url}: what came is no complete, uncompressed tar ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
