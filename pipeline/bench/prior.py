"""A prior's speed: tokens a second of training and the share of the machine's peak, and tokens a second of sampling."""

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
"""The same where orders are compared, beside one alone."""
PEAK_SIDE = 2048
"""Side of the matrices whose product is taken for the peak."""


def bench_prior(place: Place) -> list[Figure]:
    """Tokens a second of training steps, and FLOPs a second over those of a matrix product.

    For layouts of fixed length, in every precision that the device multiplies.
    """
    config = place.config
    layout = place.tokenizer.layout
    if layout.ends != "fixed":
        print("prior: only layouts of fixed length are measured")
        return []
    training = config.prior_training
    kinds = {"32": torch.float32}
    if resolve("auto", place.device) == "bf16":  # where it is emulated a step takes minutes
        kinds["bf16"] = torch.bfloat16
    arms = {f"precision {name}": dataclasses.replace(training, precision=name) for name in kinds}

    def built() -> Prior:
        L.seed_everything(config.seed, verbose=False)
        # text is another story: what its encoder gives is read, not computed
        return build_prior(config.prior, NoConditionConfig(), layout, [])

    def prepared(training: PriorTrainingConfig) -> tuple[PriorModule, L.LightningDataModule]:
        data = TokenDataModule(place.tokens, training.batch_size_per_device, token_loaders(config), config.seed, 1)
        return PriorModule(built(), training, config.seed), data

    found = compare_steps("prior", arms, prepared, place, layout.length, "tokens/s")
    flops = flops_of_token(built(), place)
    for figure, kind in zip(list(found), kinds.values(), strict=False):
        peak = peak_of(kind, place.device)
        share = figure.value * flops / peak
        name = f"FLOPs over {peak / 1e9:.0f} GFLOP/s, {str(kind).removeprefix('torch.')}"
        found.append(Figure("prior", name, share, "of the peak"))
    return found


def flops_of_token(prior: Prior, place: Place, batch: int = 4) -> float:
    """FLOPs of a forward and backward pass for each token, as counted by PyTorch: matrix products and attention."""
    reader = TokenReader(place.tokens, "train")
    tokens = Tokens.from_batch(widened(to_tensors(reader.read(torch.arange(batch).numpy()))))
    with FlopCounterMode(display=False) as counter:
        prior(tokens, Prompts.of_labels(torch.full((batch,), -1))).nll.mean().backward()
    return counter.get_total_flops() / tokens.ids[..., 0].numel()


def peak_of(kind: torch.dtype, device: torch.device, runs: int = 8) -> float:
    """FLOPs a second of the fastest of a few products of two square matrices."""
    a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(kind)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        a @ a
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * PEAK_SIDE**3 / min(seconds)


def bench_sampling(place: Place) -> list[Figure]:
    """Tokens a second of drawing whole sequences: with the cache, by full passes, and by Hugging Face's ``generate``.

    A prior of ``prior.order=scale`` stands beside it where the layout has that order. Hugging Face's draws from a Llama
    of the same depth, width, heads, hidden size and vocabulary; it is left out where
    transformers is not installed. For transformers over layouts of fixed length.
    """
    config, device = place.config, place.device
    layout = place.tokenizer.layout
    if layout.ends != "fixed" or config.prior.kind != "transformer":
        print("sampling: only transformers over layouts of fixed length are measured")
        return []
    L.seed_everything(config.seed, verbose=False)
    own: Any = config.prior
    names = ("natural", "scale") if has_scale_order(own, layout) else ("natural",)
    orders = {
        order: build_prior(dataclasses.replace(own, order=order), NoConditionConfig(), layout, []) for order in names
    }
    for each in orders.values():
        each.eval().requires_grad_(False).to(device)
    prior = orders["natural"]
    assert isinstance(prior, TransformerPrior)
    plain: dict[str, Any] = {"guidance": 1.0, "scales": 0, "rounds": [], "confidence_noise": CONFIDENCE_NOISE}
    settings = dataclasses.replace(config.sampling, **plain)
    if settings.compile:
        prior.compile_step()
    prompts = Prompts.of_labels(torch.full((SAMPLES,), -1, device=device))
    seeds = list(range(SAMPLES))
    drawn = sample(prior, prompts, settings, seeds)

    @torch.no_grad()
    def without_cache() -> None:
        """What every element costs where nothing is kept, on tokens that are there."""
        for position in range(layout.length):
            state = prior.begin(prompts, drawn.prefix(position), layout.length)
            logits = prior.logits(state, drawn.ids[:, 0, :0])
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
    found = speeds("sampling", tasks, amount, "tokens/s", place.repeats, goals)
    return found + (bench_orders(orders, settings, config.sampling.rounds, place) if len(orders) > 1 else [])


def has_scale_order(config: Any, layout: TokenLayout) -> bool:
    """Whether a prior of this config can also be one of ``prior.order=scale``."""
    try:
        permutation_of(layout, "scale")
    except InputError:
        return False
    return bool(config.averaging == "none")


def bench_orders(orders: dict[str, Prior], settings: SamplingConfig, rounds: list[int], place: Place) -> list[Figure]:
    """Images a second, one and many at once: element by element, and scale by scale in the config's rounds."""
    found, layout = [], orders["natural"].layout
    said = "+".join(map(str, rounds_of(rounds, len(layout.scales))))
    for batch, goal in ((1, (">=", 5.0)), (MANY, None)):
        prompts = Prompts.of_labels(torch.full((batch,), -1, device=place.device))
        elements, scales = f"batch {batch}, token order", f"batch {batch}, scale order, {said} rounds"
        tasks = {
            elements: partial(sample, orders["natural"], prompts, settings, range(batch)),
            scales: partial(
                sample, orders["scale"], prompts, dataclasses.replace(settings, rounds=rounds), range(batch)
            ),
        }
        goals = {scales: (elements, goal if layout.length >= 256 else None)}
        found += speeds("sampling", tasks, batch, "images/s", place.repeats, goals)
    return found


def llama_like(prior: TransformerPrior, length: int, device: torch.device) -> Any:
    """Draws ``length`` tokens of SAMPLES sequences from a Llama like ``prior``; None without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("sampling: transformers is not installed (make text), so there is nothing to compare with")
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
