"""Process lifetimes and SIGTERM: processes of a command end together, and only the first one writes shared files.

Lightning starts the other ranks by running the command line again; loader processes are forked. If the first process is
killed with -9, they are not notified. So each of them asks the kernel to be killed with its parent (Linux), or polls
for its parent (elsewhere).

Schedulers send SIGTERM to take a machine back. A command that receives it ends with exit code ``REQUEUE`` and continues
when it is called again; a training loop first saves a checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data.errors import OctavesError

REQUEUE = 75
"""Exit code of a command ended by SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"."""

_FIRST = "OCTAVES_FIRST_PROCESS"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WATCH_SECONDS = 0.5
_forking: tuple[int, bool] = (0, False)
_prepared = False
_sigterm_received = False


class Preempted(OctavesError):
    """Ended by SIGTERM. Finished work is kept, and the same command continues from there."""

    def __init__(self, done: str = "ended by SIGTERM") -> None:
        super().__init__(f"{done}; run the same command again to continue (exit code {REQUEUE})")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Context in which SIGTERM raises Preempted or, after ``defer_sigterm``, is only recorded."""
    global _sigterm_received
    _sigterm_received = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGTERM, _raise_preempted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def defer_sigterm() -> None:
    """From now on, only record SIGTERM: the running loop checks ``sigterm_received`` where it can stop.

    Call it after a Trainer has started. It replaces Lightning's handler, which starts a collective operation wherever
    the process happens to be. The Trainer restores the earlier handler when it ends.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note_sigterm)


def sigterm_received() -> bool:
    """True if this command has received SIGTERM."""
    return _sigterm_received


def _note_sigterm(number: int, frame: FrameType | None) -> None:
    global _sigterm_received
    _sigterm_received = True


def _raise_preempted(number: int, frame: FrameType | None) -> None:
    if not sigterm_received():  # schedulers may send it repeatedly
        _note_sigterm(number, frame)
        raise Preempted


def is_follower() -> bool:
    """True in a rank that the user's process started by running the command line again."""
    return _FIRST in os.environ and int(os.environ[_FIRST]) != os.getpid()


def is_first_process() -> bool:
    """True in the process that the user started, or in rank 0 if a launcher started all ranks."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def end_with_parent() -> None:
    """Make ranks and loader processes end with the process that started them. Call it at the start of a command.

    Without it, a killed command leaves ranks that wait for it, and loader processes that keep its lock.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    if os.environ.get("LOCAL_RANK", "0") != "0" and _FIRST in os.environ:
        follow(int(os.environ[_FIRST]))
    else:
        os.environ[_FIRST] = str(os.getpid())
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    # The kernel sends the signal when the forking *thread* ends, so only children of the main thread may follow.
    global _forking
    _forking = os.getpid(), threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    parent, from_main_thread = _forking
    if from_main_thread:
        if hasattr(signal, "pthread_sigmask"):
            # a scheduler's SIGTERM must not end a loader process before it can check who sent it (data.stream)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        follow(parent)


def prepare_child(parent: int) -> None:
    """For ``preexec_fn`` of a command started by ``parent``: it ends with its parent, and SIGTERM reaches it."""
    follow(parent)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked by the fork hook


def follow(parent: int) -> None:
    """Be killed when ``parent``, which started this process, ends; if it has already ended, be killed now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
