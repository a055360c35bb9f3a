"""Full disks and read-only folders for one process: mounts in a namespace of its own, as ``unshare -rm`` makes one."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.reliability.commands import patch

NEW_NAMESPACES = 0x00020000 | 0x10000000  # CLONE_NEWNS | CLONE_NEWUSER, linux/sched.h
READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # linux/mount.h
LIBC = ctypes.CDLL(None, use_errno=True)


def enter_namespace() -> None:
    """What this process mounts from now on is its own. Raises OSError where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    _check(LIBC.unshare(NEW_NAMESPACES))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    _check(LIBC.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read_only(folder: Path) -> None:
    """A setup: the folder can be read alone."""
    enter_namespace()
    mount(str(folder), folder, "", BIND)
    mount("none", folder, "", BIND | REMOUNT | READ_ONLY)


def full_disk(run: Path, where: str, call: int, arguments: list[str], out: Path) -> Callable[[], object]:
    """A setup: ``run`` is a disk that fills up at a call of a function; the command fails, and space is made.

    Returns what copies the run to ``out`` in the end.
    """
    from pipeline.__main__ import main

    enter_namespace()
    before = out.with_name("before")
    run.rename(before)
    run.mkdir()
    mount("tmpfs", run, "tmpfs", options="size=16m")
    shutil.copytree(before, run, dirs_exist_ok=True)
    filler = run / "filler"
    patch(where, call, partial(_fill, filler))
    code = main(arguments)
    left = [str(path) for path in run.rglob("*.tmp*")]
    print(f"FULL DISK: code {code}, left behind {left}", flush=True)
    filler.unlink()
    return partial(shutil.copytree, run, out)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):  # a page is the least that a tmpfs gives
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
