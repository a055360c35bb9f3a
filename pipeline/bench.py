"""bench: how fast a run's tokenizer encodes and decodes on this machine, and what memory a prior over lists takes."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.images.sources import open_source
from data.images.views import to_float
from data.layout import Tokens
from pipeline.bench_memory import check_memory, measure_memory
from pipeline.config import Config
from pipeline.evaluation_images import read_images
from pipeline.models import check_images
from pipeline.requests import parse_numbers
from pipeline.run import RunError, device_of, need
from stages.factory import build_grammar
from stages.measures.ladder import time_interleaved
from stages.weights import load_tokenizer


@dataclass
class BenchRequest:
    """How to measure."""

    repeats: int = 5
    """Timed passes over the images; one more comes first, untimed."""
    memory: str = ""
    """Image sides, comma-separated, at which the memory of a prior over lists is measured; empty: none."""
    out: str = "${run}/bench.json"
    """Where the figures go."""


def run_bench(config: Config, request: BenchRequest) -> Path:
    """Print and write images/s of ``eval.num_images`` held-out images, in batches of ``eval.batch_size``.

    Raises RunError without a tokenizer or repeats, and for memory that cannot be measured.
    """
    if request.repeats < 1:
        raise RunError(f"repeats={request.repeats}; allowed: 1 or more")
    sides = parse_numbers(request.memory, "memory") if request.memory else []
    check_memory(config, sides)
    tokenizer, metadata = load_tokenizer(need(config.tokenizer.path, "tokenizer", "train-tokenizer", config))
    check_images(tokenizer, config.images.channels, config.images.size, config.images.size)
    device = device_of(config)
    tokenizer.to(device)
    images = read_images(open_source(config.images, "val"), config.images, config.eval.num_images).pixels
    batches = [to_float(part).to(device) for part in images.split(config.eval.batch_size)]
    encoded: list[Tokens] = [tokenizer.encode(batch) for batch in batches]
    tasks: dict[str, Callable[[], object]] = {
        "encode": lambda: [tokenizer.encode(batch).to("cpu") for batch in batches],
        "decode": lambda: [tokenizer.decode(tokens).cpu() for tokens in encoded],
    }
    grammar = build_grammar(tokenizer.layout)
    if grammar is not None:
        tasks["annotate"] = lambda: [grammar.annotate(tokens.to("cpu")) for tokens in encoded]
    with torch.inference_mode():
        seconds = time_interleaved(list(tasks.values()), request.repeats)
    found: dict[str, Any] = {
        "tokenizer": metadata["kind"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "images": len(images),
        "image_size": list(images.shape[-2:]),
        "repeats": request.repeats,
        "images_per_second": {},
    }
    for name, runs in zip(tasks, seconds, strict=True):
        median = len(images) / statistics.median(runs)
        spread = [len(images) / max(runs), len(images) / min(runs)]
        found["images_per_second"][name] = {"median": median, "slowest_and_fastest": spread}
        print(f"{name:10s} {median:10.0f} images/s ({spread[0]:.0f} to {spread[1]:.0f})")
    if sides:
        found["memory"] = measure_memory(config, sides)
    out = Path(request.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    return out
