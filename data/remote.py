"""What lies at a URL or behind a pipe, in parts: ``https://…``, ``s3://…``, ``gs://…``, ``hf://…``, ``pipe:command``.

``webdataset.gopen`` opens them, by curl or the store's own program; any other store is a pipe to its program. It brings
torch along, so it is imported when something is opened: a config alone asks here whether a name is remote.
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
"""So long nothing may come before a store counts as stalled."""
PAUSES = (1.0, 4.0)
"""Seconds before each new attempt."""
REFUSED = 22
CURL_ERRORS = {
    6: "no such host",
    7: "no connection",
    18: "the connection broke",
    REFUSED: "no such file, or the server refuses it",
    28: "timed out",
    52: "the server said nothing",
    56: "the connection broke",
}
"""Of the man page of curl, what happens most."""

Result = TypeVar("Result")


class RemoteError(OctavesError):
    """What does not come; the message begins with the URL."""


class RefusedError(RemoteError):
    """A server that was there and did not give it: to ask again does not help, and curl has done so after 5xx."""


def is_remote(name: str) -> bool:
    """Whether a name is a URL or a pipe, not a path."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def parts_of(url: str) -> Iterator[bytes]:
    """What is at ``url``, in parts. Raises RemoteError, also where nothing comes for a while."""
    import webdataset

    scheme = url.partition(":")[0]
    known = ("file", "s3", *(name for name in webdataset.gopen_schemes if name != "__default__"))
    if scheme not in known:
        raise RemoteError(
            f"{url}: no way to read {scheme}:; allowed: {', '.join(known)} (a store's own program: pipe:program …)"
        )
    stream: Any = None
    try:
        with webdataset.gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if scheme == "s3" else url) as stream:
            yield from _until_it_stalls(stream)
    except Exception as error:  # each store's program and library has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        code = None if isinstance(error, RemoteError) else getattr(stream, "status", None)
        if code:
            meaning = CURL_ERRORS.get(code) if scheme in ("http", "https") else None
            reason = f"its program ended with exit code {code}" + (f" ({meaning})" if meaning else "")
        kind = RefusedError if code == REFUSED and scheme in ("http", "https") else RemoteError
        raise kind(f"{url}: {reason}") from error


def _until_it_stalls(stream: Any) -> Iterator[bytes]:
    """The parts of an open stream of webdataset's: a file, or a pipe from a program."""
    pipe = getattr(stream, "stream", stream)
    ended = False
    try:
        while not ended:
            if not wait([pipe], STALL_SECONDS):
                raise RemoteError(f"nothing came for {STALL_SECONDS:g} s")
            part = os.read(pipe.fileno(), PART)
            ended = not part
            yield part
    finally:
        if not ended and pipe is not stream:
            stream.proc.kill()  # else closing the pipe waits for it
            stream.ignore_errors = True


def attempt(action: Callable[[], Result]) -> Result:
    """The result of ``action``, tried again where it raises RemoteError; raises that after some attempts."""
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
