"""Sampling, apart from the model that it samples: any Prior, by ``begin / logits / advance / ended``.

What is notable here:

- each sample has a generator of its own, so the same seed gives the same image whatever the batch it is drawn in;
- a stream or a list ends by its grammar: its row then waits for the others of its batch;
- tokens come and go in the layout's order; the prior knows the order in which it wants to write them;
- guidance doubles the batch: logits = unconditional + guidance · (conditional - unconditional);
- temperature, top-k and top-p may differ from scale to scale; k scales may be enough;
- what is there already may be kept: a prefix (upsampling, editing), or single elements (editing under a mask).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from stages.contract import Prior, Prompts
from stages.scales import keep_scales

NOISE_CHUNK = 1024
"""Elements for which random numbers are drawn at once."""


@dataclass
class SamplingConfig:
    """How tokens are drawn: one config section, ``sampling``. Lists have one value, or one per scale."""

    temperature: list[float] = field(default_factory=lambda: [1.0])
    """Divides the logits; 0 takes the most probable id. One value or one per scale."""
    top_k: list[int] = field(default_factory=lambda: [0])
    """Keep the k most probable ids; 0 keeps all. One value or one per scale."""
    top_p: list[float] = field(default_factory=lambda: [1.0])
    """Keep the most probable ids up to this mass. One value or one per scale."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = unconditional + guidance * (conditional - unconditional); 1 is off."""
    guidance_schedule: str = "constant"
    """constant, linear or cosine: how guidance rises from 1 to its value over the sequence."""
    scales: int = 0
    """Stop after this many scales, or bit-planes; 0 samples all. Needs a decoder of prefixes."""
    compile: bool = False
    """Compile the decoding step (GPU)."""


def check_sampling(settings: SamplingConfig, layout: TokenLayout) -> None:
    """Raise ValueError for settings that do not fit the layout, naming what is allowed."""
    num_scales = len(layout.scales)
    for name, low, high in (("temperature", 0, math.inf), ("top_k", 0, math.inf), ("top_p", 1e-9, 1)):
        values = getattr(settings, name)
        # the streams of a batch are not in the same scale at the same time
        if len(values) != 1 and (len(values) != num_scales or layout.ends != "fixed"):
            several = f", or {num_scales} (one per scale)" if layout.ends == "fixed" else " for streams and lists"
            raise InputError(f"sampling.{name} has {len(values)} values; allowed: 1{several}")
        if not all(low <= value <= high for value in values):
            raise InputError(f"sampling.{name}={values}; allowed: {low} to {high}")
    if not math.isfinite(settings.guidance):
        raise InputError(f"sampling.guidance={settings.guidance}; allowed: a finite number")
    if settings.guidance_schedule not in ("constant", "linear", "cosine"):
        raise InputError(
            f"sampling.guidance_schedule={settings.guidance_schedule!r}; allowed: constant, linear, cosine"
        )
    if layout.ends != "fixed" and settings.guidance_schedule != "constant":
        raise InputError(
            f"sampling.guidance_schedule={settings.guidance_schedule}: nobody knows how long a stream will be; "
            "allowed: constant"
        )
    if not 0 <= settings.scales <= num_scales:
        raise InputError(f"sampling.scales={settings.scales}; allowed: 1 to {num_scales}, or 0 for all")


def guidance_at(settings: SamplingConfig, position: int, length: int) -> float:
    """The guidance of element ``position`` of ``length``."""
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
    """Draw one sequence for each prompt, seeded one by one.

    ``prefix`` [B, l, F] is forced, each row as far as it reaches, and brings the header where the layout has one. It
    stands in the layout's order, and must come first in the prior's; of the scales ``whole`` it has all elements. So is
    ``known`` [B, L, F] wherever ``keep`` bool [B, L] is true; an element knows only what stands before it, so what is
    kept after it has no say in it. Streams end by their grammar, or where the prior's ``max_length`` cuts them.
    Raises ValueError when settings, seeds, prefix or what is known do not fit.
    """
    layout = prior.layout
    check_sampling(settings, layout)
    batch, device = len(prompts), prompts.labels.device
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} samples")
    fixed = layout.ends == "fixed"
    length = layout.prefix_length(settings.scales) if fixed and settings.scales else prior.max_length
    if prefix is None:
        if layout.header:
            raise InputError("a layout with side information needs a prefix that brings it")
        prefix = Tokens.fixed(torch.zeros(batch, 0, layout.num_fields, dtype=torch.int64, device=device))
    if prefix.ids.shape[1] > length or len(prefix) != batch:
        raise InputError(f"a prefix of {len(prefix)}x{prefix.ids.shape[1]} elements for {batch} sequences of {length}")
    prefix = prior.to_own_order(prefix)
    start = int(prefix.lengths.min()) if batch else 0
    if start == length:
        return prior.to_layout_order(prefix)
    forced = prefix.counted
    if (known is None) != (keep is None):
        raise InputError("known tokens and the places to keep are given together")
    if known is not None and keep is not None:
        wanted = (batch, layout.length)
        if not fixed or keep.shape != wanted or known.ids.shape[:2] != wanted:
            raise InputError(
                f"known tokens {tuple(known.ids.shape[:2])}, places {tuple(keep.shape)}; allowed: {wanted}, "
                "in layouts of fixed length"
            )
        known = prior.to_own_order(known)
        keep = prior.to_own_order(Tokens.fixed(keep.long().unsqueeze(-1))).ids[..., 0].bool()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    guided = settings.guidance != 1.0
    rows = Prompts.cat([prompts, prompts.without()]) if guided else prompts
    begun = prefix.prefix(start)
    was_training = prior.training
    prior.eval()
    elements = list(begun.ids.unbind(1))
    lengths = torch.full((batch,), length)
    over = torch.zeros(batch, dtype=torch.bool)
    noise = torch.empty(batch, 0, layout.num_fields, dtype=torch.float64)
    _uniform(generators, start, layout.num_fields)  # those of what is given are skipped
    try:
        state = prior.begin(rows, Tokens.cat([begun] * 2) if guided else begun, length, whole)
        for position in range(start, length):
            ended = prior.ended(state, settings.scales or len(layout.scales))
            if ended is not None:
                ended = ended[:batch]
                lengths[ended & ~over] = position
                over |= ended
                if bool(over.all()):
                    break
            if not (position - start) % NOISE_CHUNK:
                noise = _uniform(generators, min(NOISE_CHUNK, length - position), layout.num_fields).to(device)
            scale = prior.scale_at(position) if fixed else 0
            element = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            for index in range(layout.num_fields):
                logits = prior.logits(state, torch.cat([element] * 2) if guided else element).double()
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    weight = guidance_at(settings, position, layout.length)
                    logits = unconditional + weight * (conditional - unconditional)
                chosen = draw(logits, noise[:, (position - start) % NOISE_CHUNK, index], settings, scale)
                if position < prefix.ids.shape[1]:
                    chosen = torch.where(forced[:, position], prefix.ids[:, position, index], chosen)
                if known is not None and keep is not None:
                    chosen = torch.where(keep[:, position], known.ids[:, position, index], chosen)
                element = torch.cat([element, chosen.unsqueeze(-1)], dim=-1)
            elements.append(element)
            prior.advance(state, torch.cat([element] * 2) if guided else element)
    finally:
        prior.train(was_training)
    ids = torch.stack(elements, dim=1) if elements else begun.ids
    lengths = lengths.clamp(max=ids.shape[1]).to(device)
    made = Tokens(ids, lengths, prefix.header)
    made.ids = ids.masked_fill(~made.counted.unsqueeze(-1), 0)
    if settings.scales and not fixed:
        # of a list an element of the next scale says that these are complete
        made = keep_scales(made, layout, range(settings.scales), prior.grammar)
    return prior.to_layout_order(made)


def _uniform(generators: Sequence[torch.Generator], count: int, num_fields: int) -> Tensor:
    """The next uniform numbers float64 [B, count, F], drawn on the CPU: the same on every device and in every batch."""
    return torch.stack([torch.rand(count, num_fields, generator=each, dtype=torch.float64) for each in generators])


def draw(logits: Tensor, noise: Tensor, settings: SamplingConfig, scale: int) -> Tensor:
    """Ids int64 [B] from logits float64 [B, V] by inverting the cumulative distribution at ``noise`` [B] in [0, 1)."""
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
        # an id is kept while the mass before it is below top_p, so the first always is
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return order.gather(-1, invert(ordered, noise).unsqueeze(-1)).squeeze(-1)


def invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Places int64 [B] where the running sums of ``weights`` float64 [B, V] reach the shares ``noise`` [B]."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, noise.unsqueeze(-1) * cumulative[:, -1:], right=True)
    # rounding must not reach weights of zero behind the last one above it
    last = ((weights > 0) * torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(-1)
