"""Shards at a URL or behind a pipe, copied here once: ``https://…``, ``gs://…``, ``hf://…``, ``pipe:command``.

``webdataset.gopen`` opens them, by curl or the store's own program; any other store is a pipe to its program (for S3
``pipe:aws s3 cp s3://bucket/name.tar -``). The copies lie in ``$OCTAVES_DATA/shards`` under a hash of the URL, so each
machine fetches a shard once, whichever of its processes asks first. Who changed a shard deletes its copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import webdataset

from data.files import publish, temporary_name
from data.images.home import data_home
from data.images.source import ImagesError

PART = 1 << 20


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL or a pipe."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


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
    scheme = url.partition(":")[0]
    known = ("file", *(name for name in webdataset.gopen_schemes if name != "__default__"))
    if scheme not in known:
        raise ImagesError(
            f"{url}: no way to read {scheme}:; allowed: {', '.join(known)} (a store's own program: pipe:program …)"
        )
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            for part in parts_of(url):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        try:
            with tarfile.open(temporary, "r:") as tar:
                tar.getmembers()
        except tarfile.TarError as error:
            raise ImagesError(f"{url}: what came is no complete, uncompressed tar ({error})") from error
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parts_of(url: str) -> Iterator[bytes]:
    """What is at ``url``, in parts. Raises ImagesError."""
    try:
        with webdataset.gopen(url) as stream:
            while part := stream.read(PART):
                yield part
    except Exception as error:  # each store's program and library has errors of its own
        raise ImagesError(f"{url}: {' '.join(str(error).split()) or type(error).__name__}") from error
