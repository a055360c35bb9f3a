"""plan: estimate what training a config takes on many GPUs: parameters, FLOPs, memory, throughput and days.

Notes:

- FLOPs and bytes of a training step are not derived from formulas. They are counted on the networks of the config with
  one and two layers, for one sample, on the CPU with the kind of attention that GPUs use. Every layer adds the same, so
  the full depth follows.
- What depends on the GPUs is an input and is repeated in the result: their peak, and the fraction of it that training
  reaches (``octaves bench parts=prior`` measures it).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.files import write_atomically
from data.layout import TokenLayout, Tokens
from data.tokens.shards import token_dtype
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.own_keys import PlanRequest
from stages.attention import fused_attention
from stages.contract import Prompts
from stages.factory import build_prior, build_tokenizer
from stages.measures.memory import saved_bytes
from stages.prior.sharding import sharded_parts
from stages.tokenizer.config import TokenizerTrainingConfig
from stages.tokenizer.module import TokenizerModule

CLASSES = ["class"] * 1000
TEXT = {"encoder": "minilm", "max_tokens": 32, "width": 384, "empty_length": 2}
STATE_BYTES = 20
"""Bytes per parameter that training keeps in float32: weight, gradient, two moments of Adam, averaged weight. Matrices
under Muon need one moment less."""
GATHERED_BYTES = 8
"""Bytes per parameter in float32 while it is gathered under FSDP: weight, gradient."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Cost:
    """Cost of one sample in one training step."""

    flops: float
    """Forward and backward."""
    saved: float
    """Bytes kept for the backward pass in float32; about half under bfloat16 autocast."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.saved + other.saved)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.saved * times)


def run_plan(config: Config, request: PlanRequest) -> Path:
    """Print a table and write it as JSON. Raises RunError for invalid values, and for models without a fixed cost."""
    for key, low, high in (("gpus", 1, 1e6), ("teraflops", 1e-3, 1e6), ("utilisation", 1e-3, 1), ("images", 1, 1e12)):
        if not low <= getattr(request, key) <= high:
            raise RunError(f"{key}={getattr(request, key)}; allowed: {low:g} to {high:g}")
    size = (config.images.size, config.images.size)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config.tokenizer, size, config.images.channels)
    if tokenizer.layout.ends != "fixed" or not tokenizer.trainable:
        raise RunError(
            f"tokenizer.kind={config.tokenizer.kind}: only learned tokenizers with a fixed length can be planned"
        )
    layout = tokenizer.layout
    with torch.device("meta"):
        prior = build_prior(config.prior, config.condition, layout, CLASSES, TEXT)
    stages = {
        "tokenizer": stage_plan(tokenizer, tokenizer_cost(config), config.tokenizer_training, request),
        "prior": stage_plan(prior, prior_cost(config, layout), config.prior_training, request),
    }
    if config.trainer.strategy == "fsdp":
        stages["prior"]["state_gigabytes"] = sharded_gigabytes(prior, request.gpus)
    views = 2 if config.images.flip else 1
    id_bytes = token_dtype(layout.max_vocabulary_size).itemsize
    # encoding is part of the forward pass, which is a third of a training step: an upper bound
    seconds = request.images * views * stages["tokenizer"]["flops_per_sample"] / 3 / speed_of(request)
    results: dict[str, Any] = {
        "settings": {**asdict(request), "config": config.name, "image_size": config.images.size},
        "tokens_per_image": layout.length,
        "stages": stages,
        "cache": {
            "days_at_most": seconds / SECONDS_A_DAY,
            "gigabytes": request.images * views * layout.length * layout.num_fields * id_bytes / 1e9,
        },
        "left_out": "perceptual distance and discriminator; time for reading, logging and communication",
    }
    print(table_of(results))
    out = Path(request.out)
    write_atomically(out, json.dumps(results, indent=1).encode() + b"\n")
    print(f"wrote {out}")
    return out


def speed_of(request: PlanRequest) -> float:
    """FLOPs per second of all GPUs."""
    return request.gpus * request.teraflops * 1e12 * request.utilisation


def stage_plan(network: nn.Module, cost: Cost, training: Any, request: PlanRequest) -> dict[str, Any]:
    """Estimates for one stage."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    batch = training.batch_size_per_device * training.accumulate_batches * request.gpus
    rate = speed_of(request) / cost.flops
    half = 1 if training.precision == "32" else 2  # auto is bf16 on these GPUs
    return {
        "parameters": parameters,
        "flops_per_sample": cost.flops,
        "steps": training.max_steps,
        "global_batch": batch,
        "samples_per_second": rate,
        "days": training.max_steps * batch / rate / SECONDS_A_DAY,
        "state_gigabytes": parameters * STATE_BYTES / 1e9,
        "activation_gigabytes": cost.saved * training.batch_size_per_device / half / 1e9,
    }


def sharded_gigabytes(prior: nn.Module, gpus: int) -> float:
    """Training state per GPU under FSDP: its share, and what is gathered at the same time.

    The weights outside the layers are gathered for the whole pass, those of layers only for the current and next one.
    """
    layers, rest = sharded_parts(prior)
    gathered = rest + sum(sorted(layers)[-2:])
    return (STATE_BYTES * (sum(layers) + rest) / gpus + GATHERED_BYTES * gathered) / 1e9


def tokenizer_cost(config: Config) -> Cost:
    """Cost of one image: encoder, quantizer and decoder, forward and backward."""
    full = {part: getattr(config.tokenizer, part).depth for part in ("encoder", "decoder")}
    return at_depth(lambda depths: tokenizer_cost_of(config, depths), full)


def tokenizer_cost_of(config: Config, depths: dict[str, int]) -> Cost:
    """Measured cost of one image for encoder and decoder with ``depths`` layers."""
    section, side = config.tokenizer, config.images.size
    parts = {part: dataclasses.replace(getattr(section, part), depth=depth) for part, depth in depths.items()}
    tokenizer = build_tokenizer(dataclasses.replace(section, **parts), (side, side), config.images.channels)
    training = TokenizerTrainingConfig(adversarial_weight=0, perceptual="none")
    module = TokenizerModule(tokenizer.train(), training, config.seed)
    pixels = torch.rand(1, config.images.channels, side, side) * 2 - 1
    return measured(lambda: torch.stack(list(module.loss_terms(pixels)[0].values())).sum(), tokenizer)


def prior_cost(config: Config, layout: TokenLayout) -> Cost:
    """Cost of one sequence, forward and backward; recomputed layers count again."""
    section: Any = config.prior
    return at_depth(lambda depths: prior_cost_of(config, layout, depths), {"depth": section.depth})


def prior_cost_of(config: Config, layout: TokenLayout, depths: dict[str, int]) -> Cost:
    """Measured cost of one sequence for a prior with ``depths`` layers."""
    section: Any = config.prior
    prior = build_prior(dataclasses.replace(section, **depths), config.condition, layout, CLASSES, TEXT).train()
    ids = torch.zeros(1, layout.length, layout.num_fields, dtype=torch.int64)
    prompts = Prompts.of_labels(torch.zeros(1, dtype=torch.int64))
    return measured(lambda: prior(Tokens.fixed(ids), prompts).nll.mean(), prior)


def measured(step: Callable[[], Tensor], network: nn.Module) -> Cost:
    """FLOPs of a step, forward and backward, and the bytes that it keeps for the backward pass."""
    with FlopCounterMode(display=False) as counter, fused_attention():
        losses: list[Tensor] = []
        saved = saved_bytes(lambda: losses.append(step()), network)["rest"]
        losses[0].backward()
    return Cost(counter.get_total_flops(), saved)


def at_depth(cost: Callable[[dict[str, int]], Cost], full: dict[str, int]) -> Cost:
    """Cost at the ``full`` depths, extrapolated from one layer in each part, and two layers in one part at a time."""
    ones = dict.fromkeys(full, 1)
    first = cost(ones)
    total = first
    for part, depth in full.items():
        total = total + (cost({**ones, part: 2}) - first) * (depth - 1)
    return total


def table_of(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, stages = found["settings"], found["stages"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters, M", lambda stage: f"{stage['parameters'] / 1e6:.1f}"),
        ("TFLOP a sample, forward and backward", lambda stage: f"{stage['flops_per_sample'] / 1e12:.3f}"),
        ("steps x global batch", lambda stage: f"{stage['steps']:,d} x {stage['global_batch']}"),
        ("samples a second", lambda stage: f"{stage['samples_per_second']:.0f}"),
        ("days", lambda stage: f"{stage['days']:.1f}"),
        ("GB a GPU: weights, gradients, Adam, average", lambda stage: f"{stage['state_gigabytes']:.1f}"),
        ("GB a GPU: kept for the backward pass", lambda stage: f"{stage['activation_gigabytes']:.1f}"),
    ]
    lines = [f"| {settings['config']}: {found['tokens_per_image']} tokens | tokenizer | prior |", "|---|---|---|"]
    lines += [f"| {name} | {text(stages['tokenizer'])} | {text(stages['prior'])} |" for name, text in rows]
    cache = found["cache"]
    lines.append(f"| cache | at most {cache['days_at_most']:.2f} days, {cache['gigabytes']:.1f} GB | |")
    machine = f"{settings['gpus']} GPUs of {settings['teraflops']:g} TFLOP/s at {settings['utilisation']:.0%} of that"
    return "\n".join([f"{machine}; left out: {found['left_out']}", "", *lines])
