"""Sampling from any Prior through ``begin / logits / advance / ended``, and ``look`` for ``prior.order=scale``.

Design notes:

- each sample has its own generator, so a seed gives the same image in any batch;
- the grammar ends a stream or a list; its row then waits for the rest of the batch;
- input and output tokens are in the layout's order; the prior converts to and from its own order;
- guidance doubles the batch: logits = unconditional + guidance · (conditional - unconditional);
- temperature, top-k and top-p may differ per scale; sampling may stop after k scales;
- a prior with ``prior.order=scale`` writes each scale in rounds, the most confident elements first;
- existing tokens can be kept: a prefix (upsampling, editing) or single elements (editing under a mask).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from data.tokens.config import PRECISIONS
from stages.contract import Prior, Prompts
from stages.doubles import doubled, doubles_at
from stages.prior.config import CONFIDENCE_NOISE, SamplingConfig
from stages.prior.rounds import rounds_of, still_open
from stages.scales import keep_scales

NOISE_CHUNK = 1024
"""Number of elements for which random numbers are drawn at once."""


def check_sampling(settings: SamplingConfig, layout: TokenLayout) -> None:
    """Raise ValueError for settings that do not fit the layout; the message names the allowed values."""
    num_scales = len(layout.scales)
    for name, low, high in (
        ("temperature", 0, math.inf),
        ("top_k", 0, math.inf),
        ("top_p", 1e-9, 1),
        ("rounds", 1, math.inf),
    ):
        values = getattr(settings, name)
        if name == "rounds" and not values:
            continue
        # streams of one batch reach a scale at different times
        if len(values) != 1 and (len(values) != num_scales or layout.ends != "fixed"):
            several = f", or {num_scales} (one per scale)" if layout.ends == "fixed" else " for streams and lists"
            raise InputError(f"sampling.{name} has {len(values)} values; allowed: 1{several}")
        if not all(low <= value <= high for value in values):
            raise InputError(f"sampling.{name}={values}; allowed: {low} to {high}")
    if not 0 <= settings.confidence_noise < math.inf:
        raise InputError(f"sampling.confidence_noise={settings.confidence_noise}; allowed: 0 or more")
    if not math.isfinite(settings.guidance):
        raise InputError(f"sampling.guidance={settings.guidance}; allowed: a finite number")
    if settings.guidance_schedule not in ("constant", "linear", "cosine"):
        raise InputError(
            f"sampling.guidance_schedule={settings.guidance_schedule!r}; allowed: constant, linear, cosine"
        )
    if layout.ends != "fixed" and settings.guidance_schedule != "constant":
        raise InputError(
            f"sampling.guidance_schedule={settings.guidance_schedule}: the length of a stream is not known in "
            "advance; allowed: constant"
        )
    if settings.precision not in PRECISIONS:
        raise InputError(f"sampling.precision={settings.precision!r}; allowed: {', '.join(PRECISIONS)}")
    if not 0 <= settings.scales <= num_scales:
        raise InputError(f"sampling.scales={settings.scales}; allowed: 1 to {num_scales}, or 0 for all")


def check_order(settings: SamplingConfig, prior: Prior) -> None:
    """Raise InputError for scales or rounds that the prior's order does not support."""
    if not prior.writes_prefixes and settings.scales not in (0, len(prior.layout.scales)):
        raise InputError(
            f"sampling.scales={settings.scales}: this prior writes scales in the order {prior.order} and cannot stop "
            "after the first ones; set sampling.scales=0, or train a prior with prior.order=natural"
        )
    if (settings.rounds or settings.confidence_noise != CONFIDENCE_NOISE) and prior.order != "scale":
        raise InputError(
            f"sampling.rounds={settings.rounds}, sampling.confidence_noise={settings.confidence_noise}: a prior with "
            f"prior.order={prior.order} writes one element at a time; remove these settings, or train a prior with "
            "prior.order=scale"
        )


def guidance_at(settings: SamplingConfig, position: int, length: int) -> float:
    """Guidance weight at element (or round) ``position`` of ``length``."""
    share = position / max(1, length - 1)
    rise = {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}
    return 1.0 + (settings.guidance - 1.0) * rise[settings.guidance_schedule]


@torch.no_grad()
def sample(
    prior: Prior,
    prompts: Prompts,
    settings: SamplingConfig,
    seeds: Sequence[int],
    prefix: Tokens | None = None,
    known: Tokens | None = None,
    keep: Tensor | None = None,
    whole: Sequence[int] = (),
) -> Tokens:
    """Draw one sequence per prompt; each sequence has its own seed.

    ``prefix`` [B, l, F] is kept unchanged, each row up to its own length, and carries the header if the layout has one.
    It is in the layout's order, and the prior's order must begin with the same elements. It contains all elements of
    the scales ``whole``. Elements of ``known`` [B, L, F] are also kept wherever ``keep`` bool [B, L] is True. A sampled
    element depends only on elements before it, so kept elements after it do not influence it; with
    ``prior.order=scale`` it depends on all kept elements of its scale. Streams end by their grammar or at the prior's
    ``max_length``.
    Raises ValueError when settings, seeds, prefix or known tokens do not fit.
    """
    layout = prior.layout
    check_sampling(settings, layout)
    check_order(settings, prior)
    batch, device = len(prompts), prompts.labels.device
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} samples; give one seed per sample")
    fixed = layout.ends == "fixed"
    length = layout.prefix_length(settings.scales) if fixed and settings.scales else prior.max_length
    if prefix is None:
        if layout.header:
            raise InputError("got no prefix; a layout with side information needs a prefix that carries its header")
        prefix = Tokens.fixed(torch.zeros(batch, 0, layout.num_fields, dtype=torch.int64, device=device))
    if prefix.ids.shape[1] > length or len(prefix) != batch:
        raise InputError(
            f"the prefix has {len(prefix)}x{prefix.ids.shape[1]} elements (sequences x length); allowed: {batch} "
            f"sequences of at most {length}"
        )
    if fixed and not prior.writes_prefixes and len(prefix.lengths.unique()) > 1:
        raise InputError(
            f"prefix rows have {int(prefix.lengths.min())} to {int(prefix.lengths.max())} elements; allowed with "
            f"prior.order={prior.order}: the same number in every row"
        )
    prefix = prior.to_own_order(prefix, whole)
    start = int(prefix.lengths.min()) if batch else 0
    if start == length:
        return prior.to_layout_order(prefix)
    forced = prefix.counted
    if (known is None) != (keep is None):
        raise InputError("only one of known and keep is given; known tokens and the places to keep are given together")
    if known is not None and keep is not None:
        expected = (batch, layout.length)
        if not fixed or keep.shape != expected or known.ids.shape[:2] != expected:
            raise InputError(
                f"known tokens {tuple(known.ids.shape[:2])}, places {tuple(keep.shape)}; allowed: {expected}, "
                "in layouts of fixed length"
            )
        known = prior.to_own_order(known)
        keep = prior.to_own_order(Tokens.fixed(keep.long().unsqueeze(-1))).ids[..., 0].bool()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if prior.order == "scale":
        given = torch.zeros(batch, length, layout.num_fields, dtype=torch.int64, device=device)
        is_given = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if known is not None and keep is not None:
            given, is_given = known.ids[:, :length].clone(), keep[:, :length].clone()
        given[:, : prefix.ids.shape[1]] = torch.where(forced.unsqueeze(-1), prefix.ids, given[:, : prefix.ids.shape[1]])
        is_given[:, : prefix.ids.shape[1]] |= forced
        return Tokens.fixed(_sample_scales(prior, prompts, settings, generators, given, is_given))
    guided = settings.guidance != 1.0
    guided_prompts = Prompts.cat([prompts, prompts.without()]) if guided else prompts
    start_tokens = prefix.prefix(start)
    was_training = prior.training
    prior.eval()
    elements = list(start_tokens.ids.unbind(1))
    lengths = torch.full((batch,), length)
    finished = torch.zeros(batch, dtype=torch.bool)
    noise, exact = torch.empty(batch, 0, layout.num_fields, dtype=torch.float64), doubles_at(device)
    _uniform(generators, start, layout.num_fields)  # skip the random numbers of the given elements
    try:
        state = prior.begin(guided_prompts, Tokens.cat([start_tokens] * 2) if guided else start_tokens, length, whole)
        for position in range(start, length):
            ended = prior.ended(state, settings.scales or len(layout.scales))
            if ended is not None:
                ended = ended[:batch]
                lengths[ended & ~finished] = position
                finished |= ended
                if bool(finished.all()):
                    break
            if not (position - start) % NOISE_CHUNK:
                noise = _uniform(generators, min(NOISE_CHUNK, length - position), layout.num_fields).to(exact)
            scale = prior.scale_at(position) if fixed else 0
            element = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            for index in range(layout.num_fields):
                logits = doubled(prior.logits(state, torch.cat([element] * 2) if guided else element))
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    weight = guidance_at(settings, position, layout.length)
                    logits = unconditional + weight * (conditional - unconditional)
                chosen = draw(logits, noise[:, (position - start) % NOISE_CHUNK, index], settings, scale).to(device)
                if position < prefix.ids.shape[1]:
                    chosen = torch.where(forced[:, position], prefix.ids[:, position, index], chosen)
                if known is not None and keep is not None:
                    chosen = torch.where(keep[:, position], known.ids[:, position, index], chosen)
                element = torch.cat([element, chosen.unsqueeze(-1)], dim=-1)
            elements.append(element)
            prior.advance(state, torch.cat([element] * 2) if guided else element)
    finally:
        prior.train(was_training)
    ids = torch.stack(elements, dim=1) if elements else start_tokens.ids
    lengths = lengths.clamp(max=ids.shape[1]).to(device)
    sampled = Tokens(ids, lengths, prefix.header)
    sampled.ids = ids.masked_fill(~sampled.counted.unsqueeze(-1), 0)
    if settings.scales and not fixed:
        # in a list, an element of the next scale marks these scales as complete, so drop it
        sampled = keep_scales(sampled, layout, range(settings.scales), prior.grammar)
    return prior.to_layout_order(sampled)


def _sample_scales(
    prior: Any,
    prompts: Prompts,
    settings: SamplingConfig,
    generators: Sequence[torch.Generator],
    ids: Tensor,
    keep: Tensor,
) -> Tensor:
    """Sample from a prior with ``prior.order=scale``: int64 [B, l, F], equal to ``ids`` where ``keep`` [B, l] is True.

    Each round draws all open elements and reopens the least confident ones for the next round.
    """
    layout, (_, length, num_fields) = prior.layout, ids.shape
    exact, rounds = doubles_at(ids.device), rounds_of(settings.rounds, len(layout.scales))
    guided = settings.guidance != 1.0
    scale_ends = layout.ends_of_scales[: layout.num_scales_in(length)]
    start = max((end for end in (0, *scale_ends) if bool(keep[:, :end].all())), default=0)
    was_training = prior.training
    prior.eval()

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if guided else x

    try:
        start_tokens = Tokens.fixed(twice(ids[:, :start]))
        state = prior.begin(Prompts.cat([prompts, prompts.without()]) if guided else prompts, start_tokens, length)
        for number, end in enumerate(scale_ends):
            first, num_rounds = end - layout.scales[number].length, rounds[number]
            noise = _uniform(generators, num_rounds * (end - first), num_fields + 1).unflatten(
                1, (num_rounds, end - first)
            )
            if end <= start:
                continue  # this scale is given; its random numbers are drawn and skipped
            open_ = ~keep[:, first:end]
            num_open, ids_here = open_.sum(1), ids[:, first:end]
            for round_index in range(num_rounds):
                if not open_.any():
                    break
                open_noise = noise[:, round_index].to(exact)[open_.to(exact)]
                weight = guidance_at(settings, sum(rounds[:number]) + round_index, sum(rounds))
                prior.look(state, twice(ids_here), twice(open_))
                chosen = ids_here.new_zeros(len(open_noise), 0)
                confidence = open_noise.new_zeros(len(open_noise))
                for index in range(num_fields):
                    logits = doubled(prior.logits(state, twice(chosen)))
                    if guided:
                        conditional, unconditional = logits.chunk(2)
                        logits = unconditional + weight * (conditional - unconditional)
                    drawn = draw(logits, open_noise[:, index], settings, number).unsqueeze(-1)
                    confidence += (logits.gather(-1, drawn) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
                    chosen = torch.cat([chosen, drawn.to(ids.device)], dim=-1)
                ids_here[open_] = chosen
                share_done = (round_index + 1) / num_rounds
                gumbel = -(-open_noise[:, -1].clamp(min=1e-30).log()).log()
                open_ = still_open(
                    open_, confidence + settings.confidence_noise * (1 - share_done) * gumbel, num_open, share_done
                )
            prior.advance(state, twice(ids_here))
    finally:
        prior.train(was_training)
    return ids


def _uniform(generators: Sequence[torch.Generator], count: int, num_fields: int) -> Tensor:
    """Next uniform numbers, float64 [B, count, F]; drawn on the CPU, so they are the same for any device and batch."""
    return torch.stack(
        [torch.rand(count, num_fields, generator=generator, dtype=torch.float64) for generator in generators]
    )


def draw(logits: Tensor, noise: Tensor, settings: SamplingConfig, scale: int) -> Tensor:
    """Ids int64 [B] drawn from logits float64 [B, V] by inverse transform sampling at ``noise`` [B] in [0, 1)."""
    temperature = settings.temperature[min(scale, len(settings.temperature) - 1)]
    top_k = settings.top_k[min(scale, len(settings.top_k) - 1)]
    top_p = settings.top_p[min(scale, len(settings.top_p) - 1)]
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if (not 0 < top_k < probabilities.shape[-1]) and top_p >= 1:
        return invert(probabilities, noise)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < ordered.shape[-1]:
        ordered[:, top_k:] = 0
    if top_p < 1:
        # keep an id while the mass before it is below top_p, so the first id is always kept
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return order.gather(-1, invert(ordered, noise).unsqueeze(-1)).squeeze(-1)


def invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Indices int64 [B] where the cumulative ``weights`` float64 [B, V] reach the share ``noise`` [B] of their sum."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, noise.unsqueeze(-1) * cumulative[:, -1:], right=True)
    # rounding must not select a zero weight after the last positive one
    last = ((weights > 0) * torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(-1)
