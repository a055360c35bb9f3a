"""Read a URL or a pipe in parts: ``https://…``, ``s3://…``, ``gs://…``, ``hf://…``, ``pipe:command``.

``webdataset.gopen`` opens URLs with curl or with the command-line program of the store. For any other store, use a pipe
to its program. webdataset imports torch, so it is imported only when a URL is opened: reading a config calls only
``is_remote``.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any, TypeVar

from data.errors import OctavesError

PART = 1 << 20
STALL_SECONDS = 60.0
"""Time without data after which a download counts as stalled."""
PAUSES = (1.0, 4.0)
"""Seconds to wait before each retry."""
REFUSED = 22
CURL_ERRORS = {
    6: "no such host",
    7: "no connection",
    18: "the connection broke",
    REFUSED: "no such file, or the server refuses it",
    28: "timed out",
    52: "the server sent no reply",
    56: "the connection broke",
}
"""The most frequent exit codes of curl, from its man page."""

Result = TypeVar("Result")


class RemoteError(OctavesError):
    """A download failed; the message begins with the URL."""


class RefusedError(RemoteError):
    """The server refused the request. It is not retried: curl itself has already retried after a 5xx status."""


def is_remote(name: str) -> bool:
    """True if a name is a URL or a pipe, not a path."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def parts_of(url: str) -> Iterator[bytes]:
    """The content of ``url``, in parts. Raises RemoteError if it fails or stalls for ``STALL_SECONDS``."""
    import webdataset

    scheme = url.partition(":")[0]
    schemes = ("file", "s3", *(name for name in webdataset.gopen_schemes if name != "__default__"))
    if scheme not in schemes:
        raise RemoteError(
            f"{url}: cannot read {scheme}:; allowed: {', '.join(schemes)} (for other stores use pipe:program …)"
        )
    stream: Any = None
    try:
        with webdataset.gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if scheme == "s3" else url) as stream:
            yield from _until_it_stalls(stream)
    except Exception as error:  # the program or library of each store raises its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        code = None if isinstance(error, RemoteError) else getattr(stream, "status", None)
        if code:
            meaning = CURL_ERRORS.get(code) if scheme in ("http", "https") else None
            reason = f"its program ended with exit code {code}" + (f" ({meaning})" if meaning else "")
        kind = RefusedError if code == REFUSED and scheme in ("http", "https") else RemoteError
        raise kind(f"{url}: {reason}") from error


def _until_it_stalls(stream: Any) -> Iterator[bytes]:
    """The parts of an open webdataset stream, which is a file or a pipe from a program."""
    pipe = getattr(stream, "stream", stream)
    ended = False
    try:
        while not ended:
            if not wait([pipe], STALL_SECONDS):
                raise RemoteError(f"no data for {STALL_SECONDS:g} s")
            part = os.read(pipe.fileno(), PART)
            ended = not part
            yield part
    finally:
        if not ended and pipe is not stream:
            stream.proc.kill()  # otherwise closing the pipe waits for it
            stream.ignore_errors = True


def attempt(action: Callable[[], Result]) -> Result:
    """The result of ``action``, retried after each RemoteError except RefusedError.

    Raises RemoteError if the last attempt fails too.
    """
    for pause in PAUSES:
        try:
            return action()
        except RefusedError:
            raise
        except RemoteError:
            time.sleep(pause)
    try:
        return action()
    except RemoteError as error:
        raise RemoteError(f"{error}; tried {len(PAUSES) + 1} times") from error
