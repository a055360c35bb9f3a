"""How many cores a command may use, and how many threads it takes of them.

What is notable here:

- not what the machine has counts but what this process may use: its CPU affinity and the quota of its cgroup. More
  threads than that wait for one another at the end of every operation;
- the processes of a run on one machine share the cores: two on two cores with two threads each would be many times
  slower than with one;
- the number of threads decides the last bits of sums, so it follows from affinity, quota and processes alone. Whoever
  sets OMP_NUM_THREADS has the last word;
- torch is not imported for it.
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
_OURS = "OCTAVES_THREADS"  # what this command, or the one that started it, wrote into _THREADS
_CORES = "OCTAVES_CORES"  # what a command that starts others side by side leaves to each of them


def usable_cores() -> int:
    """Cores that this process may use, 1 or more: those of its CPU affinity, or as many as a quota of a cgroup allows.

    Hardware threads of one core count once, as torch counts them. A quota of half a core is 1, one of 3.5 cores is 3.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_siblings(cpu) for cpu in allowed})
    return max(1, int(min([cores, float(os.environ.get(_CORES, cores)), *_quotas()])))


def environment_beside(commands: int) -> dict[str, str]:
    """The environment of a command that shares this process's cores with others, so many in all."""
    share = {_CORES: str(max(1, usable_cores() // commands))} if commands > 1 else {}
    return {**os.environ, **share}


def share_of_cores(processes: int) -> int:
    """Cores of each of the ``processes`` that a run has on this machine, 1 or more.

    Tasks of a SLURM step have cores of their own where it was said how many: their affinity is each task's already.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(usable_cores(), int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, usable_cores() // processes)


def use_threads(processes: int = 1) -> None:
    """Let torch work on this process's share of the cores; the run has so many ``processes`` on this machine.

    Nothing is changed where OMP_NUM_THREADS is set: by the user, or by torchrun, which gives each of several processes
    one thread. Loader processes have one thread each, by torch.
    """
    given = os.environ.get(_THREADS)
    if given is not None and given != os.environ.get(_OURS):
        return
    if processes == 1 and not hasattr(os, "sched_getaffinity") and _CORES not in os.environ:
        return  # nothing says what may be used: torch's own number leaves the slow cores of an Apple machine out
    threads = share_of_cores(processes)
    # The variable is for a torch that is imported later, for processes that this one starts (a rank comes to the same
    # number by itself), and for Lightning, which would divide all cores by its ranks whatever the quota is.
    os.environ[_THREADS] = os.environ[_OURS] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _siblings(cpu: int) -> str:
    """What the hardware threads of one core have in common."""
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[float]:
    """The limits, in cores, of the cgroups that this process is in and of all above them, of either version."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # version 2 names no controllers, and lies beside those of version 1 where both are mounted
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                yield from _quota(CGROUPS / mount / group)


def _quota(group: Path) -> Iterator[float]:
    """The limit of one cgroup in cores, where it has one."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text(encoding="ascii") for file in files).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
