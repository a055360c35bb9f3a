"""Ranks of one run end together, each with one line instead of a traceback.

Lightning starts the other ranks, and if one of them fails, it kills the first one with -9, without a message. If the
first one notices the failure earlier, it ends with the traceback of a broken connection. Here it reports which rank
ended, and how.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from data.errors import OctavesError
from pipeline.errors import RunError
from pipeline.processes import REQUEUE, Preempted, is_follower

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 20.0  # for a first process that is still writing; if it only waits for the dead rank, it ends earlier
_NOTICE_SECONDS = 5.0  # the connection breaks before the process has ended


class Watched:
    """Mixin for strategies: the first process starts and watches the ranks, unless a launcher has started them."""

    started: Sequence[subprocess.Popen[bytes]] = ()
    """The ranks that this process started."""
    _launcher: _Launcher | None

    def _configure_launcher(self: Any) -> None:
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _WatchedRanks(self)


class WatchedDDP(Watched, DDPStrategy):
    """DDP: every rank keeps the whole training state."""


class _WatchedRanks(_SubprocessScriptLauncher):
    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        # Lightning's observer gets an empty list, so that it never kills this process.
        self._strategy.started, self.procs = tuple(self.procs), []
        threading.Thread(target=_watch, args=(self._strategy.started,), daemon=True).start()


def _watch(started: Sequence[subprocess.Popen[bytes]]) -> None:
    while not (failed := _failed(started)):
        time.sleep(_POLL_SECONDS)
    time.sleep(_GRACE_SECONDS)
    os.write(sys.stderr.fileno(), f"octaves: {failed}\n".encode())
    os._exit(REQUEUE if isinstance(failed, Preempted) else 2)


def _failed(started: Sequence[subprocess.Popen[bytes]]) -> OctavesError | None:
    for rank, process in enumerate(started, 1):
        code = process.poll()
        if code == REQUEUE:
            return Preempted()
        if code:
            outcome = (
                f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}; its message says why"
            )
            return RunError(f"process {rank} of this run {outcome}; run the same command again to continue")
    return None


@contextmanager
def ending_together(trainer: L.Trainer) -> Iterator[None]:
    """Turn errors caused by a lost process into one line: raises RunError, Preempted or the loader's own error.

    A rank that the first process started prints nothing if it loses the others, because the first process reports it.
    """
    try:
        yield
    except OctavesError as error:
        if message := _from_loader(error):
            raise OctavesError(message) from error
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        # fetching a batch at that moment fails with a connection error, before torch notices the dead worker
        if "DataLoader worker" in str(error) or not isinstance(error, RuntimeError):
            raise RunError(
                f"a loader process has ended ({str(error).splitlines()[0]}); run the same command again to continue, "
                "with a smaller trainer.num_workers if memory is short"
            ) from error
        started = getattr(trainer.strategy, "started", ())
        deadline = time.monotonic() + _NOTICE_SECONDS
        while started and time.monotonic() < deadline:
            if failed := _failed(started):
                raise failed from error
            time.sleep(_POLL_SECONDS)
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        if is_follower():
            sys.exit(2)
        raise RunError("another process of this run has ended; run the same command again to continue") from error


def _from_loader(error: OctavesError) -> str | None:
    """The original message if torch has wrapped an error of a loader process with its traceback; otherwise None."""
    text = str(error)
    if "Original Traceback" not in text:
        return None
    _, name, message = text.rpartition(f"{type(error).__name__}: ")
    return message.strip() if name else None
