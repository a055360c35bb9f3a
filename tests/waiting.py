"""Waiting in tests: for what must happen, however busy the machine is. No test measures time."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from itertools import count

PATIENCE = 600
"""Seconds after which what a test waits for is held to hang; where all is well nobody waits that long."""
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below those that systems give away to whoever asks for any
_ports = count(os.getpid() * 97)


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Return when ``happened``. Fails the test where it does not."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens at, and that no connection of another process can be given meanwhile."""
    for number in _ports:
        port = FIRST_PORT + number % NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
