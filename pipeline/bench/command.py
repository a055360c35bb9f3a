"""bench: measure the speed of every part of a config on this machine, with a reference where available."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.files import write_atomically
from pipeline.bench.figures import Figure, line_of
from pipeline.bench.lists import check_memory, measure_memory
from pipeline.bench.place import Place
from pipeline.bench.prior import bench_prior, bench_sampling
from pipeline.bench.tokenizer import bench_tokenizer, bench_training
from pipeline.bench.tokens import bench_cache, bench_reader
from pipeline.bench.transforms import bench_transforms
from pipeline.config import Config
from pipeline.cores import usable_cores
from pipeline.errors import RunError
from pipeline.own_keys import BenchRequest
from pipeline.placement import device_name
from pipeline.requests import parse_numbers

PARTS: dict[str, Callable[[Place], list[Figure]]] = {
    "transforms": lambda place: bench_transforms(place.repeats, place.device),
    "tokenizer": bench_tokenizer,
    "training": bench_training,
    "cache": bench_cache,
    "reader": bench_reader,
    "prior": bench_prior,
    "sampling": bench_sampling,
}

SHORT_PRODUCTS = ("amx_tile", "amx_bf16", "amx_fp16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx512_vnni")
"""Instructions for matrix products of numbers with fewer than 32 bits, by their names in torch."""


def run_bench(config: Config, request: BenchRequest) -> Path:
    """Print a table and write it as JSON. Weights are new, because they do not affect speed, so no run is needed.

    Raises RunError for an unknown part, for fewer than one repeat, and if memory cannot be measured.
    """
    parts = list(PARTS) if request.parts == "all" else request.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise RunError(f"parts={unknown[0]}; allowed: all, {', '.join(PARTS)}")
    if request.repeats < 1:
        raise RunError(f"repeats={request.repeats}; allowed: 1 or more")
    sides = parse_numbers(request.memory, "memory") if request.memory else []
    check_memory(config, sides)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(config, request.repeats, Path(folder))
        for part in parts:
            for figure in PARTS[part](place):
                figures.append(figure)
                print(line_of(figure), flush=True)
    machine = machine_of(place.device)
    print(
        f"on {machine['device']}: {' '.join(machine['instructions'])}; usable cores: {machine['usable_cores']}, "
        f"threads: {machine['threads']}"
    )
    results: dict[str, Any] = {
        "machine": machine,
        "settings": {
            **asdict(request),
            "config": config.name,
            "image_size": config.images.size,
            "precision": place.config.prior_training.precision,
        },
        "figures": [figure.to_dict() for figure in figures],
        "peak_memory_bytes": peak_memory(place.device),
    }
    print(f"peak memory of the whole benchmark: {results['peak_memory_bytes'] / 1e6:.0f} MB")
    if sides:
        results["memory"] = measure_memory(config, sides)
    out = Path(request.out)
    write_atomically(out, json.dumps(results, indent=1).encode() + b"\n")
    print(f"wrote {out}")
    return out


def machine_of(device: torch.device) -> dict[str, Any]:
    """Hardware and software that the results depend on."""
    return {
        "device": cpu_name() if device.type == "cpu" else device_name(device),
        "cpu": cpu_name(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def instructions() -> list[str]:
    """The instruction set that torch's own loops use, then instructions for matrix products with fewer than 32 bits."""
    # older versions of torch do not report the latter
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [
        torch.backends.cpu.get_cpu_capability(),
        *(name for name in SHORT_PRODUCTS if capabilities.get(name) is True),
    ]


def cpu_name() -> str:
    """Name of the processor if the system reports it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: on a CUDA GPU if one was used, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
