"""The processes of one run on several devices end together, each with one line and no traceback.

Lightning starts the other ranks and kills the first one with -9, without a word, when one of them fails; where the
first one notices earlier, it ends with the traceback of a broken connection. Here it says which rank ended, and how.
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
_GRACE_SECONDS = 20.0  # the first process may be writing; where it only waits for the dead one, it waits no longer
_NOTICE_SECONDS = 5.0  # a connection breaks before its process has ended


class Watched:
    """Makes a strategy one on ranks that the first process starts and watches, or that a launcher started."""

    started: Sequence[subprocess.Popen[bytes]] = ()
    """The ranks that this process started."""
    _launcher: _Launcher | None

    def _configure_launcher(self: Any) -> None:
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _WatchedRanks(self)


class WatchedDDP(Watched, DDPStrategy):
    """Every rank keeps the whole training state."""


class _WatchedRanks(_SubprocessScriptLauncher):
    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        # Lightning's observer gets an empty list, and has nothing to kill this process for.
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
            how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}; its message says why"
            return RunError(f"process {rank} of this run {how}; run the same command again to continue")
    return None


@contextmanager
def ending_together(trainer: L.Trainer) -> Iterator[None]:
    """Turn what a lost process does to this one into one line: raises RunError, Preempted or the loader's own error.

    A rank that the first process started says nothing when it loses the others, for the first process speaks.
    """
    try:
        yield
    except OctavesError as error:
        if message := _from_loader(error):
            raise OctavesError(message) from error
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        # a batch that is fetched at that moment breaks its connection before torch notices
        if "DataLoader worker" in str(error) or not isinstance(error, RuntimeError):
            raise RunError(
                f"a loader process has ended ({str(error).splitlines()[0]}); run the same command again to continue, "
                "with a smaller trainer.num_workers where memory is short"
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
    """The message alone where torch has wrapped an error of a loader process with its traceback."""
    text = str(error)
    if "Original Traceback" not in text:
        return None
    _, name, message = text.rpartition(f"{type(error).__name__}: ")
    return message.strip() if name else None
