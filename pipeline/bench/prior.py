"""Speed of a prior: training in tokens/s and as a fraction of the peak, and sampling in tokens/s."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from data.tokens.module import TokenDataModule, to_tensors, widened
from data.tokens.reader import TokenReader
from pipeline.bench.figures import Figure, speeds
from pipeline.bench.place import Place
from pipeline.bench.steps import compare_steps
from pipeline.placement import token_loaders, wait_for
from stages.conditions.labels import NoConditionConfig
from stages.contract import Prior, Prompts
from stages.factory import build_prior
from stages.precision import resolve
from stages.prior.config import PriorTrainingConfig
from stages.prior.module import PriorModule
from stages.prior.order import permutation_of
from stages.prior.rounds import rounds_of
from stages.prior.sampling import CONFIDENCE_NOISE, SamplingConfig, sample
from stages.prior.transformer import TransformerPrior

SAMPLES = 16
"""Sequences sampled at once."""
MANY = 64
"""Sequences sampled at once when orders are compared; a single sequence is measured, too."""
PEAK_SIDE = 2048
"""Side of the square matrices whose product defines the peak."""


def bench_prior(place: Place) -> list[Figure]:
    """Tokens per second in training steps, and their FLOPs per second divided by those of a matrix product.

    Only for layouts of fixed length; in every precision in which the device multiplies.
    """
    config = place.config
    layout = place.tokenizer.layout
    if layout.ends != "fixed":
        print("prior: only layouts of fixed length are measured")
        return []
    training = config.prior_training
    kinds = {"32": torch.float32}
    if resolve("auto", place.device) == "bf16":  # emulated bfloat16 would take minutes per step
        kinds["bf16"] = torch.bfloat16
    arms = {f"precision {name}": dataclasses.replace(training, precision=name) for name in kinds}

    def new_prior() -> Prior:
        L.seed_everything(config.seed, verbose=False)
        # no text: encoded captions are read, not computed
        return build_prior(config.prior, NoConditionConfig(), layout, [])

    def prepared(training: PriorTrainingConfig) -> tuple[PriorModule, L.LightningDataModule]:
        data = TokenDataModule(place.tokens, training.batch_size_per_device, token_loaders(config), config.seed, 1)
        return PriorModule(new_prior(), training, config.seed), data

    figures = compare_steps("prior", arms, prepared, place, layout.length, "tokens/s")
    flops = flops_of_token(new_prior(), place)
    for figure, kind in zip(list(figures), kinds.values(), strict=False):
        peak = peak_of(kind, place.device)
        share = figure.value * flops / peak
        name = f"FLOPs over {peak / 1e9:.0f} GFLOP/s, {str(kind).removeprefix('torch.')}"
        figures.append(Figure("prior", name, share, "of the peak"))
    return figures


def flops_of_token(prior: Prior, place: Place, batch: int = 4) -> float:
    """FLOPs per token of a forward and backward pass, as counted by PyTorch: matrix products and attention."""
    reader = TokenReader(place.tokens, "train")
    tokens = Tokens.from_batch(widened(to_tensors(reader.read(torch.arange(batch).numpy()))))
    with FlopCounterMode(display=False) as counter:
        prior(tokens, Prompts.of_labels(torch.full((batch,), -1))).nll.mean().backward()
    return counter.get_total_flops() / tokens.ids[..., 0].numel()


def peak_of(kind: torch.dtype, device: torch.device, runs: int = 8) -> float:
    """FLOPs per second of the fastest of several products of two square matrices."""
    a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(kind)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * PEAK_SIDE**3 / min(seconds)


def bench_sampling(place: Place) -> list[Figure]:
    """Tokens per second when sampling sequences: with cache, by full passes, and with ``generate`` of Hugging Face.

    A prior with ``prior.order=scale`` is added if the layout supports that order. Hugging Face samples from a Llama
    with the same depth, width, heads, hidden size and vocabulary; it is left out if transformers is not installed. Only
    for transformers over layouts of fixed length.
    """
    config, device = place.config, place.device
    layout = place.tokenizer.layout
    if layout.ends != "fixed" or config.prior.kind != "transformer":
        print("sampling: only transformers over layouts of fixed length are measured")
        return []
    L.seed_everything(config.seed, verbose=False)
    prior_config: Any = config.prior
    names = ("natural", "scale") if has_scale_order(prior_config, layout) else ("natural",)
    orders = {
        order: build_prior(dataclasses.replace(prior_config, order=order), NoConditionConfig(), layout, [])
        for order in names
    }
    for order_prior in orders.values():
        order_prior.eval().requires_grad_(False).to(device)
    prior = orders["natural"]
    assert isinstance(prior, TransformerPrior)
    plain: dict[str, Any] = {"guidance": 1.0, "scales": 0, "rounds": [], "confidence_noise": CONFIDENCE_NOISE}
    settings = dataclasses.replace(config.sampling, **plain)
    if settings.compile:
        prior.compile_step()
    prompts = Prompts.of_labels(torch.full((SAMPLES,), -1, device=device))
    seeds = list(range(SAMPLES))
    tokens = sample(prior, prompts, settings, seeds)

    @torch.no_grad()
    def without_cache() -> None:
        """The cost of sampling without a cache, on given tokens."""
        for position in range(layout.length):
            state = prior.begin(prompts, tokens.prefix(position), layout.length)
            logits = prior.logits(state, tokens.ids[:, 0, :0])
            torch.multinomial(logits.softmax(-1), 1)

    tasks: dict[str, Any] = {
        "with cache": lambda: sample(prior, prompts, settings, seeds),
        "by full passes": without_cache,
    }
    goals: dict[str, tuple[str, tuple[str, float] | None]] = {"with cache": ("by full passes", None)}
    llama = llama_like(prior, layout.length, device)
    if llama is not None:
        tasks |= {"Hugging Face's Llama": llama, "with cache again": tasks["with cache"]}
        goals["with cache again"] = ("Hugging Face's Llama", (">=", 2.0))
    amount = SAMPLES * layout.length
    figures = speeds("sampling", tasks, amount, "tokens/s", place.repeats, goals)
    return figures + (bench_orders(orders, settings, config.sampling.rounds, place) if len(orders) > 1 else [])


def has_scale_order(config: Any, layout: TokenLayout) -> bool:
    """Whether a prior with this config also supports ``prior.order=scale``."""
    try:
        permutation_of(layout, "scale")
    except InputError:
        return False
    return bool(config.averaging == "none")


def bench_orders(orders: dict[str, Prior], settings: SamplingConfig, rounds: list[int], place: Place) -> list[Figure]:
    """Images per second, one and many at once: element by element, and scale by scale in the rounds of the config."""
    figures, layout = [], orders["natural"].layout
    rounds_text = "+".join(map(str, rounds_of(rounds, len(layout.scales))))
    for batch, goal in ((1, (">=", 5.0)), (MANY, None)):
        prompts = Prompts.of_labels(torch.full((batch,), -1, device=place.device))
        elements, scales = f"batch {batch}, token order", f"batch {batch}, scale order, {rounds_text} rounds"
        tasks = {
            elements: partial(sample, orders["natural"], prompts, settings, range(batch)),
            scales: partial(
                sample, orders["scale"], prompts, dataclasses.replace(settings, rounds=rounds), range(batch)
            ),
        }
        goals = {scales: (elements, goal if layout.length >= 256 else None)}
        figures += speeds("sampling", tasks, batch, "images/s", place.repeats, goals)
    return figures


def llama_like(prior: TransformerPrior, length: int, device: torch.device) -> Any:
    """Function that samples ``length`` tokens of SAMPLES sequences from a similar Llama; None without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("sampling: transformers is not installed (make text), so there is no comparison with it")
        return None
    config = prior.config
    hidden = int(prior.blocks[0].mlp.fc1_x.out_features)  # type: ignore[union-attr, arg-type]
    vocabulary = prior.layout.max_vocabulary_size
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            intermediate_size=hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            max_position_embeddings=length + 1,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    generator: Any = llama.eval().requires_grad_(False).to(device)
    start = torch.zeros(SAMPLES, 1, dtype=torch.long, device=device)
    mask = torch.ones_like(start)
    return lambda: generator.generate(
        start, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length
    )
