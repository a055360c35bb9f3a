"""``prior.order=scale``: the transformer that predicts a whole scale given the coarser ones.

VAR's order (Tian et al., arXiv 2404.02905) with MaskGIT's decoding (Chang et al., arXiv 2202.04200): elements of a
scale are not independent, so each is predicted given some of the others, and a scale is written in a few rounds.
What is notable here:

- attention is block-causal: an element looks at its own scale and at all coarser ones;
- every sequence trains all scales at once. It stands there twice: clean copies, of which a scale looks at clean ones up
  to itself, and masked copies, of which a scale looks at the clean ones before it and at itself. That is exactly what
  sampling sees, at less than twice the length; to train one random scale of each sequence costs half of that and learns
  from a fraction of the tokens;
- attention takes these blocks one by one (``Spans``): no mask, and about as many pairs as one copy has without one
  (four scales of 64 elements and one of condition: 65,985; 66,049 without a mask, 33,153 under a causal one);
- a scale of which nothing is masked is its own clean copy: one embedding and one network for both;
- sampling keeps keys and values of finished scales. The pass that adds a scale's is the first round of the next one.

The loss is that of masked elements given any others: no likelihood of a sequence, and no rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from stages.attention import Spans
from stages.conditions.config import ConditionConfig
from stages.contract import PriorOutput, Prompts
from stages.prior.rounds import mask_of_samples, random_mask
from stages.prior.transformer import Memory, TransformerPrior, TransformerPriorConfig

HELD_OUT_SEED = 0
"""Of the masks under which held-out sequences are judged: the same one every time, and in every batch."""


class ScaleState:
    """Sequences while their scales are sampled."""

    def __init__(self, cache: Tensor, memory: Memory | None, pending: Tensor, position: int) -> None:
        self.cache = cache
        """[depth, 2, B, H, T, D/H]"""
        self.memory = memory
        self.pending = pending
        """[B, m, D]: inputs of finished elements (first: of the condition) whose keys and values are not there yet."""
        self.position = position
        """Elements that are finished."""
        self.hidden = pending[:0, 0]
        """[N, D], of the N open elements of the scale that was looked at last"""


class ScalewisePrior(TransformerPrior):
    """``prior.order=scale``. Raises InputError for streams, and for moving averages, which are causal."""

    causal = False
    likelihood = False
    codebook_of: Tensor
    """int64 [L]"""

    def __init__(
        self,
        config: TransformerPriorConfig,
        condition: ConditionConfig,
        layout: TokenLayout,
        class_names: list[str],
        text: dict[str, Any] | None = None,
    ) -> None:
        if config.averaging != "none":
            raise InputError(
                f"prior.averaging={config.averaging} with prior.order=scale: averages of the past need one; set "
                "prior.averaging=none"
            )
        super().__init__(config, condition, layout, class_names, text)
        self.mask = nn.Parameter(0.02 * torch.randn(config.width))
        self.ends = layout.ends_of_scales
        self.first_of = {codebook: places[0] for codebook, places in self.codebook_places.items()}
        """A position of each codebook."""
        codebooks = [layout.scales[number].codebook for number in self.scales]
        self.register_buffer("codebook_of", torch.tensor(codebooks), persistent=False)

    def nll(self, tokens: Tokens, prompts: Prompts) -> NoReturn:
        raise InputError("prior.order=scale has no likelihood: its loss is of masked elements, given any others")

    # ------------------------------------------------------------------ training

    def _inputs(self, ids: Tensor, first: int, masked: Tensor | None = None) -> Tensor:
        """[B, n, D] of the elements ids [B, n, F] at ``first`` and after, but for those ``masked`` bool [B, n]."""
        x = self.inputs.elements(ids, first, None)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask.to(x.dtype), x)
        return x + self.inputs.places(first, first + ids.shape[1], None)

    def _clean_spans(self, start: int, stop: int) -> list[tuple[slice, list[slice]]]:
        """What clean slots look at, from element ``start`` to ``stop``, both ends of scales; below 0 is the condition.

        Queries are counted from the first of these slots.
        """
        states = self.condition.num_states
        borders = [-states] if start < 0 else [start]
        borders += [end for end in (0, *self.ends) if borders[0] < end <= stop]
        return [
            (slice(a - borders[0], b - borders[0]), [slice(0, states + b)])
            for a, b in zip(borders, borders[1:], strict=False)
        ]

    def _training_spans(self, length: int) -> Spans:
        """Of [condition | clean copies but that of the last scale | masked copies]."""
        states, ends = self.condition.num_states, [end for end in self.ends if end <= length]
        starts = [0, *ends[:-1]]
        masked = states + starts[-1]
        spans: list[tuple[slice, list[slice]]] = self._clean_spans(-1, starts[-1])
        for start, end in zip(starts, ends, strict=True):
            own = slice(masked + start, masked + end)
            spans.append((own, [slice(0, states + start), own]))
        return spans

    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """The cost of elements that are masked at random, and which they are; in evaluation a sample's own, always the
        same ones.

        Tokens may be a prefix of scales. Raises ValueError for a part of a scale.
        """
        ids, length = tokens.ids, tokens.ids.shape[1]
        num_scales = self.layout.num_scales_in(length)
        lengths = [scale.length for scale in self.layout.scales[:num_scales]]
        if self.training:
            masked = random_mask(len(tokens), lengths, ids.device, None)
        else:
            masked = mask_of_samples(ids, lengths, HELD_OUT_SEED)
        return self.judge_masked(tokens, prompts, masked)

    def judge_masked(self, tokens: Tokens, prompts: Prompts, masked: Tensor) -> PriorOutput:
        """The cost of each element ``masked`` bool [B, L], given those of its scale that are not and coarser scales."""
        ids, length = tokens.ids, tokens.ids.shape[1]
        states = self.condition(prompts)
        clean = max(0, *(end for end in (0, *self.ends) if end < length))
        x = [states.prefix, self._inputs(ids[:, :clean], 0), self._inputs(ids, 0, masked)]
        kind = states.prefix.dtype
        hidden = self._blocks(
            torch.cat([each.to(kind) for each in x], dim=1),
            self._training_spans(length),
            memory=self._remember(states),
        )[:, -length:]
        # of all elements, not of the masked ones alone: their number changes from batch to batch, and tensors of ever
        # other sizes fragment a CPU's memory (33 MB an update, 6 GB after 1,500)
        nll = torch.zeros(ids.shape, device=ids.device)
        for codebook, first in self.first_of.items():
            places = (self.codebook_of[:length] == codebook).nonzero()[:, 0]
            there, wanted = hidden[:, places].flatten(0, 1), ids[:, places].flatten(0, 1)
            costs = [
                functional.cross_entropy(
                    self._field_logits(there, codebook, first, wanted[:, :field]), wanted[:, field], reduction="none"
                )
                for field in range(wanted.shape[1])
            ]
            nll = nll.index_copy(1, places, torch.stack(costs, dim=-1).view(len(ids), len(places), len(costs)))
        nll = torch.where(masked.unsqueeze(-1), nll, 0.0)
        return PriorOutput(nll, judged=masked)

    # ------------------------------------------------------------------ one scale at a time

    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> ScaleState:  # type: ignore[override]
        """State of a sequence of ``length`` elements that starts with the whole scales of ``prefix``."""
        states = self.condition(prompts)
        pending = states.prefix
        if prefix is not None and prefix.ids.shape[1]:
            pending = torch.cat([pending, self._inputs(prefix.ids, 0).to(pending.dtype)], dim=1)
        position = pending.shape[1] - self.condition.num_states
        self.layout.num_scales_in(position)
        size = self.condition.num_states + length
        return ScaleState(self._allocate(len(prompts), size, size), self._remember(states), pending, position)

    def look(self, state: ScaleState, ids: Tensor, open_: Tensor) -> None:
        """See the next scale, ids int64 [B, n, F] but for its N elements ``open_`` bool [B, n]; ``logits`` are theirs.

        Its keys and values take the places that the finished scale will have.
        """
        states, start = self.condition.num_states, state.position
        stop, waiting = start + ids.shape[1], state.pending.shape[1]
        x = torch.cat([state.pending, self._inputs(ids, start, open_).to(state.pending.dtype)], dim=1)
        # the condition waits before the first look only
        before = start - waiting if waiting <= start else -1
        spans: Spans | None = None
        if waiting:
            own = (slice(waiting, x.shape[1]), [slice(0, states + stop)])
            spans = [*self._clean_spans(before, start), own]
        slots = torch.arange(states + stop - x.shape[1], states + stop, device=x.device)
        hidden = self._blocks(x, spans, state.cache[..., : states + stop, :], slots, state.memory)
        state.pending = x[:, :0]
        state.hidden = hidden[:, waiting:][open_]

    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """float32 [N, V] of the next field of the open elements, given the fields int64 [N, f] chosen so far."""
        codebook = self.layout.scales[self.scales[state.position]].codebook
        return self._field_logits(state.hidden, codebook, state.position, partial)

    def advance(self, state: Any, element: Tensor) -> None:
        """Finish the next scale, with the elements int64 [B, n, F]."""
        finished = self._inputs(element, state.position).to(state.pending.dtype)
        state.pending = torch.cat([state.pending, finished], dim=1)
        state.position += element.shape[1]

    def compile_step(self) -> None:
        raise InputError("sampling.compile=true with prior.order=scale: its steps are of many shapes; leave it out")
