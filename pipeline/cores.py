"""The number of cores and threads that a command uses.

Notes:

- The limit is what this process may use (its CPU affinity and the quota of its cgroup), not the cores of the machine.
  More threads than that wait for each other at the end of every operation.
- The processes of a run on one machine share its cores: on two cores, two processes with two threads each are many
  times slower than with one thread each.
- The number of threads changes the last bits of sums, so it depends only on affinity, quota and the number of
  processes. OMP_NUM_THREADS takes precedence if the user sets it.
- This module does not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_THREADS = "OMP_NUM_THREADS"
_OURS = "OCTAVES_THREADS"  # the value that this command, or the one that started it, wrote into _THREADS
_CORES = "OCTAVES_CORES"  # cores for each of several commands that run side by side


def usable_cores() -> int:
    """Cores that this process may use, at least 1: those of its CPU affinity, limited by the quotas of its cgroups.

    Hardware threads of one core count once, as in torch. A quota of half a core gives 1, one of 3.5 cores gives 3.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_siblings(cpu) for cpu in allowed})
    return max(1, int(min([cores, float(os.environ.get(_CORES, cores)), *_quotas()])))


def environment_beside(commands: int) -> dict[str, str]:
    """Environment of one of ``commands`` commands that share the cores of this process."""
    share = {_CORES: str(max(1, usable_cores() // commands))} if commands > 1 else {}
    return {**os.environ, **share}


def share_of_cores(processes: int) -> int:
    """Cores for each of the ``processes`` of a run on this machine, at least 1.

    If SLURM_CPUS_PER_TASK is set, each task of a SLURM step already has its own cores as its affinity.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(usable_cores(), int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, usable_cores() // processes)


def use_threads(processes: int = 1) -> None:
    """Set the number of torch threads to this process's share of the cores, if a run has ``processes`` on this machine.

    Does nothing if OMP_NUM_THREADS is set: by the user, or by torchrun, which gives one thread to each of several
    processes. In torch, loader processes have one thread each.
    """
    given = os.environ.get(_THREADS)
    if given is not None and given != os.environ.get(_OURS):
        return
    if processes == 1 and not hasattr(os, "sched_getaffinity") and _CORES not in os.environ:
        return  # no limits are known here: torch's own number excludes the slow cores of Apple machines
    threads = share_of_cores(processes)
    # The variable is for a torch that is imported later, for processes that this one starts (ranks compute the same
    # number themselves), and for Lightning, which would divide all cores by its ranks, ignoring the quota.
    os.environ[_THREADS] = os.environ[_OURS] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _siblings(cpu: int) -> str:
    """A string that is equal for all hardware threads of one core."""
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[float]:
    """Limits, in cores, of the cgroups of this process and of all their parents, for both cgroup versions."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 names no controllers; where version 1 is mounted, too, version 2 is under "unified"
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                yield from _quota(CGROUPS / mount / group)


def _quota(group: Path) -> Iterator[float]:
    """The limit of one cgroup in cores, if it has one."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text(encoding="ascii") for file in files).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
