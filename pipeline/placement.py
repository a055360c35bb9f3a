"""Where a run takes place: the device, its processes, and those that load for them.

What is notable here:

- what a config leaves to ``auto`` the machine decides, by the same functions for every command;
- nothing here changes a result on purpose, so it may differ between two calls of one run;
- Lightning is imported for what trains alone: the other commands ask for a device only.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.constants import default_pg_timeout

from data.images.sources import lies_in_memory
from pipeline.cores import share_of_cores
from pipeline.errors import RunError

if TYPE_CHECKING:
    from pipeline.config import Config, TrainerConfig

MOST_LOADERS = 8
"""Loader processes of a process where nobody says how many: more of them wait for the disk or for the GPU."""
CORES_A_LOADER = 4
"""Cores for each loader process where the training itself works on them."""


def device_for(accelerator: str) -> torch.device:
    """What ``trainer.accelerator`` means: auto is a CUDA GPU where there is one, else Apple's, else the CPU.

    Raises RunError for a GPU that is not there.
    """
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there.get(accelerator) is False:
        missing = {"gpu": "CUDA GPU", "mps": "Apple GPU"}[accelerator]
        raise RunError(f"trainer.accelerator={accelerator}, but there is no {missing} here; use auto or cpu")
    if accelerator == "auto":
        accelerator = next((kind for kind in there if there[kind]), "cpu")
    return torch.device("cuda" if accelerator == "gpu" else accelerator)


def device_of(config: Config) -> torch.device:
    """The device of a command that runs in one process. Raises RunError for a GPU that is not there."""
    return device_for(config.trainer.accelerator)


def device_name(device: torch.device) -> str:
    """The name of a CUDA GPU; mps and cpu are called that."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def processes_here(place: TrainerConfig) -> int:
    """Processes that training and caching have on this machine. Raises RunError where there are not as many GPUs."""
    device = device_for(place.accelerator)
    if device.type == "cpu":
        return max(1, place.devices)  # every GPU of none: the CPU
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    # a launcher may show each process its own GPU alone
    if place.devices > gpus and (device.type == "mps" or "LOCAL_RANK" not in os.environ):
        raise RunError(
            f"trainer.devices={place.devices}, but this machine has {gpus} GPU{'s' * (gpus > 1)}; set trainer.devices="
            f"{gpus}, or trainer.accelerator=cpu"
        )
    return gpus if place.devices == -1 else place.devices


def placement(place: TrainerConfig, timeout: timedelta = default_pg_timeout) -> dict[str, Any]:
    """Trainer arguments that say where work runs; data modules split the data themselves.

    ``timeout``: how long a rank waits for the others. Raises RunError for GPUs that are not there, and for several
    processes on Apple's.
    """
    device, devices = device_for(place.accelerator), processes_here(place)
    processes = place.num_nodes * devices
    strategy: Any = "auto"
    if processes > 1:
        if device.type == "mps":
            raise RunError(
                f"trainer.num_nodes={place.num_nodes} on mps: torch has no communication between Apple GPUs; set "
                "trainer.num_nodes=1, or trainer.accelerator=cpu"
            )
        from pipeline.ranks import WatchedDDP
        from pipeline.sharding import WatchedFSDP

        strategy = WatchedFSDP(processes, timeout) if place.strategy == "fsdp" else WatchedDDP(timeout=timeout)
    return {
        "accelerator": device.type,
        "devices": devices,
        "num_nodes": place.num_nodes,
        "strategy": strategy,
        "use_distributed_sampler": False,
        "enable_progress_bar": place.progress,
        "enable_model_summary": False,
    }


def image_loaders(config: Config) -> int:
    """Loader processes of each process that reads images: ``trainer.num_workers``, and what auto means for them.

    None for images that lie in memory. Beside a GPU each process has its share of the cores but one, on which it feeds
    the GPU, up to ``MOST_LOADERS``. Where the CPU itself works, reading is a small part of a step, and a loader that
    takes a core holds up the threads on all others, which wait for that one at the end of every operation: so a loader
    for ``CORES_A_LOADER`` cores, and none on two.
    """
    place = config.trainer
    if isinstance(place.num_workers, int):
        return place.num_workers
    if lies_in_memory(config.images.kind):
        return 0
    cores = share_of_cores(processes_here(place))
    on_cpu = device_for(place.accelerator).type == "cpu"
    return min(MOST_LOADERS, cores // CORES_A_LOADER if on_cpu else cores - 1)


def token_loaders(config: Config) -> int:
    """Loader processes of each process that reads tokens: auto is none, for one process reads more than any prior."""
    workers = config.trainer.num_workers
    return workers if isinstance(workers, int) else 0
