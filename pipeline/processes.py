"""Processes that belong together end together, and only the first of them writes what is common.

Lightning starts the other ranks by running the command line again; loader processes are forked. When the first one is
killed with -9, nobody tells them. Each asks the kernel to be killed with its parent (Linux), or watches it (elsewhere).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_FIRST = "OCTAVES_FIRST_PROCESS"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WATCH_SECONDS = 0.5
_forking: tuple[int, bool] = (0, False)
_prepared = False


def is_first_process() -> bool:
    """True in the process that the user started, or in rank 0 where a launcher started all of them."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def end_with_parent() -> None:
    """Call at the start of a command: ranks and loader processes then end when the process that started them does.

    Without it a killed command leaves ranks that wait for it, and loader processes that keep its lock.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    if os.environ.get("LOCAL_RANK", "0") != "0" and _FIRST in os.environ:
        _follow(int(os.environ[_FIRST]))
    else:
        os.environ[_FIRST] = str(os.getpid())
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    # The kernel's signal comes when the forking *thread* ends, so only children of the main thread may follow.
    global _forking
    _forking = os.getpid(), threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    parent, from_main_thread = _forking
    if from_main_thread:
        _follow(parent)


def _follow(parent: int) -> None:
    """Be killed when ``parent`` ends, or now if it has ended."""
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
