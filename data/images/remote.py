"""Shards at a URL or behind a pipe, copied here once: ``https://…``, ``s3://…``, ``gs://…``, ``pipe:command``.

``webdataset.gopen`` opens them; what it cannot open by itself it asks of the store's own program (``gsutil``, …). The
copies lie in ``$OCTAVES_DATA/shards`` under a hash of the URL, so each machine fetches a shard once, whichever of its
processes asks first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from pathlib import Path

import webdataset

from data.images.home import data_home
from data.images.source import ImagesError
from data.tokens.files import publish, temporary_name


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
            fetch(url, path)
    return path


def fetch(url: str, path: Path) -> None:
    """Copy what is at ``url`` to ``path``, which is whole or not there. Raises ImagesError."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            with webdataset.gopen(url) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        if not temporary.stat().st_size:
            raise ImagesError(f"{url}: nothing came")
        publish(temporary, path)
    except ImagesError:
        raise
    except Exception as error:  # each store's program and library has errors of its own
        raise ImagesError(f"{url}: {' '.join(str(error).split()) or type(error).__name__}") from error
    finally:
        temporary.unlink(missing_ok=True)
