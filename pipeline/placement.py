"""Where a run is executed: the device, its processes, and their loader processes.

Notes:

- ``auto`` in a config is resolved by the same functions for every command.
- Nothing here is meant to change results, so it may differ between two calls of one run.
- Lightning is imported only by the commands that train; the others only need a device.
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
"""Maximum number of loader processes per process for ``auto``: more would wait for the disk or for the GPU."""
CORES_A_LOADER = 4
"""Cores per loader process if training itself runs on the CPU."""


def device_for(accelerator: str) -> torch.device:
    """Device of ``trainer.accelerator``: auto is a CUDA GPU if available, otherwise an Apple GPU, otherwise the CPU.

    Raises RunError for a GPU that is not available.
    """
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available.get(accelerator) is False:
        missing = {"gpu": "CUDA GPU", "mps": "Apple GPU"}[accelerator]
        raise RunError(f"trainer.accelerator={accelerator}, but there is no {missing} here; use auto or cpu")
    if accelerator == "auto":
        accelerator = next((kind for kind in available if available[kind]), "cpu")
    return torch.device("cuda" if accelerator == "gpu" else accelerator)


def device_of(config: Config) -> torch.device:
    """Device of a command that runs in one process. Raises RunError for a GPU that is not available."""
    return device_for(config.trainer.accelerator)


def device_name(device: torch.device) -> str:
    """Name of a CUDA GPU; otherwise mps or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; on the CPU, there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def processes_here(place: TrainerConfig) -> int:
    """Number of processes for training and caching on this machine. Raises RunError if there are not enough GPUs."""
    device = device_for(place.accelerator)
    if device.type == "cpu":
        return max(1, place.devices)  # -1, one per GPU, is one process on the CPU
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    # a launcher may make only one GPU visible to each process
    if place.devices > gpus and (device.type == "mps" or "LOCAL_RANK" not in os.environ):
        raise RunError(
            f"trainer.devices={place.devices}, but this machine has {gpus} GPU{'s' * (gpus > 1)}; set trainer.devices="
            f"{gpus}, or trainer.accelerator=cpu"
        )
    return gpus if place.devices == -1 else place.devices


def placement(place: TrainerConfig, timeout: timedelta = default_pg_timeout) -> dict[str, Any]:
    """Trainer arguments for device, processes and strategy. Data modules split the data themselves.

    ``timeout``: how long a rank waits for the others. Raises RunError for GPUs that are not available, and for several
    processes on Apple GPUs.
    """
    device, devices = device_for(place.accelerator), processes_here(place)
    processes = place.num_nodes * devices
    strategy: Any = "auto"
    if processes > 1:
        if device.type == "mps":
            raise RunError(
                f"trainer.num_nodes={place.num_nodes} on mps: torch cannot communicate between Apple GPUs; set "
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
    """Loader processes of each process that reads images: ``trainer.num_workers``, or the number for auto.

    For images in memory auto is 0. With a GPU, each process has loaders on all of its cores but one, which feeds the
    GPU, up to ``MOST_LOADERS``. On the CPU, reading takes a small part of a step, and a loader that occupies a core
    delays the threads on all others, which wait for each other at the end of every operation. So there is one loader
    per ``CORES_A_LOADER`` cores, and none on two cores.
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
    """Loader processes of each process that reads tokens. auto is 0: one process reads faster than any prior trains."""
    workers = config.trainer.num_workers
    return workers if isinstance(workers, int) else 0
