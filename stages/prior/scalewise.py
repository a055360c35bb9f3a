"""``prior.order=scale``: a transformer that predicts a whole scale given the coarser scales.

It combines VAR's order (Tian et al., arXiv 2404.02905) with MaskGIT's decoding (Chang et al., arXiv 2202.04200). The
elements of a scale are not independent, so each is predicted given some of the others, and sampling writes a scale in a
few rounds. Design notes:

- attention is block-causal: an element attends to its own scale and to all coarser scales;
- every sequence trains all scales at once. The input holds clean copies and masked copies of the scales. A clean scale
  attends to clean scales up to and including itself; a masked scale attends to the clean scales before it and to
  itself. This matches sampling exactly, at less than twice the length. Training one random scale per sequence would
  cost half as much but learn from a fraction of the tokens;
- attention runs block by block (``Spans``), without a mask. It computes about as many pairs as full attention over one
  copy (for four scales of 64 elements and one condition state: 65,985; 66,049 for full and 33,153 for causal attention
  over one copy);
- clean and masked copies share the embedding and the network: a clean copy is a scale with nothing masked;
- sampling caches the keys and values of finished scales. They are added in the first round of the next scale.

The loss is the cost of masked elements given any other elements. It is neither a likelihood of the sequence nor a rate.
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
"""Seed of the masks for held-out sequences, so that a sequence has the same mask in every evaluation and batch."""


class ScaleState:
    """State of a batch of sequences during sampling."""

    def __init__(self, cache: Tensor, memory: Memory | None, pending: Tensor, position: int) -> None:
        self.cache = cache
        """[depth, 2, B, H, T, D/H]"""
        self.memory = memory
        self.pending = pending
        """[B, m, D]: inputs of finished elements (at first, of the condition) that are not yet in the cache."""
        self.position = position
        """Number of finished elements."""
        self.hidden = pending[:0, 0]
        """[N, D]: hidden states of the N open elements in the last call of ``look``."""


class ScalewisePrior(TransformerPrior):
    """Prior with ``prior.order=scale``. Raises InputError for streams and for moving averages, which are causal."""

    causal = False
    likelihood = False
    codebook_of: Tensor
    """int64 [L]: codebook of each element."""

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
                f"prior.averaging={config.averaging} with prior.order=scale: moving averages need a causal order; set "
                "prior.averaging=none"
            )
        super().__init__(config, condition, layout, class_names, text)
        self.mask = nn.Parameter(0.02 * torch.randn(config.width))
        self.ends = layout.ends_of_scales
        self.first_of = {codebook: places[0] for codebook, places in self.codebook_places.items()}
        """First position of each codebook."""
        codebooks = [layout.scales[number].codebook for number in self.scales]
        self.register_buffer("codebook_of", torch.tensor(codebooks), persistent=False)

    def nll(self, tokens: Tokens, prompts: Prompts) -> NoReturn:
        raise InputError(
            "prior.order=scale has no likelihood: its loss is the cost of masked elements given any others; train a "
            "prior with prior.order=natural"
        )

    # ------------------------------------------------------------------ training

    def _inputs(self, ids: Tensor, first: int, masked: Tensor | None = None) -> Tensor:
        """Inputs [B, n, D] of elements ids [B, n, F] at ``first`` and after; ``masked`` bool [B, n] ones are hidden."""
        x = self.inputs.elements(ids, first, None)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask.to(x.dtype), x)
        return x + self.inputs.places(first, first + ids.shape[1], None)

    def _clean_spans(self, start: int, stop: int) -> list[tuple[slice, list[slice]]]:
        """Attention spans of the clean slots from element ``start`` to ``stop``, both at the ends of scales.

        A negative ``start`` includes the condition. Query indices are relative to the first of these slots.
        """
        states = self.condition.num_states
        borders = [-states] if start < 0 else [start]
        borders += [end for end in (0, *self.ends) if borders[0] < end <= stop]
        return [
            (slice(a - borders[0], b - borders[0]), [slice(0, states + b)])
            for a, b in zip(borders, borders[1:], strict=False)
        ]

    def _training_spans(self, length: int) -> Spans:
        """Attention spans of [condition | clean copies of all scales but the last | masked copies]."""
        states, ends = self.condition.num_states, [end for end in self.ends if end <= length]
        starts = [0, *ends[:-1]]
        masked = states + starts[-1]
        spans: list[tuple[slice, list[slice]]] = self._clean_spans(-1, starts[-1])
        for start, end in zip(starts, ends, strict=True):
            own = slice(masked + start, masked + end)
            spans.append((own, [slice(0, states + start), own]))
        return spans

    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """Score randomly masked elements, which ``judged`` of the output marks.

        In evaluation the mask of a sample is fixed. Tokens may be a prefix of scales. Raises ValueError for an
        incomplete scale.
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
        """Score the elements ``masked`` bool [B, L], given the unmasked elements of their scale and coarser scales."""
        ids, length = tokens.ids, tokens.ids.shape[1]
        states = self.condition(prompts)
        clean = max(0, *(end for end in (0, *self.ends) if end < length))
        x = [states.prefix, self._inputs(ids[:, :clean], 0), self._inputs(ids, 0, masked)]
        kind = states.prefix.dtype
        hidden = self._blocks(
            torch.cat([part.to(kind) for part in x], dim=1),
            self._training_spans(length),
            memory=self._remember(states),
        )[:, -length:]
        # score all elements, not only the masked ones: their number changes from batch to batch, and tensors of varying
        # sizes fragment CPU memory (33 MB per update, 6 GB after 1,500 updates)
        nll = torch.zeros(ids.shape, device=ids.device)
        for codebook, first in self.first_of.items():
            places = (self.codebook_of[:length] == codebook).nonzero()[:, 0]
            hidden_here, targets = hidden[:, places].flatten(0, 1), ids[:, places].flatten(0, 1)
            costs = [
                functional.cross_entropy(
                    self._field_logits(hidden_here, codebook, first, targets[:, :field]),
                    targets[:, field],
                    reduction="none",
                )
                for field in range(targets.shape[1])
            ]
            nll = nll.index_copy(1, places, torch.stack(costs, dim=-1).view(len(ids), len(places), len(costs)))
        nll = torch.where(masked.unsqueeze(-1), nll, 0.0)
        return PriorOutput(nll, judged=masked)

    # ------------------------------------------------------------------ one scale at a time

    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> ScaleState:  # type: ignore[override]
        """State of a sequence of ``length`` elements that starts with ``prefix``, which consists of whole scales."""
        states = self.condition(prompts)
        pending = states.prefix
        if prefix is not None and prefix.ids.shape[1]:
            pending = torch.cat([pending, self._inputs(prefix.ids, 0).to(pending.dtype)], dim=1)
        position = pending.shape[1] - self.condition.num_states
        self.layout.num_scales_in(position)
        size = self.condition.num_states + length
        return ScaleState(self._allocate(len(prompts), size, size), self._remember(states), pending, position)

    def look(self, state: ScaleState, ids: Tensor, open_: Tensor) -> None:
        """Run the network on the next scale, ids int64 [B, n, F] with its N elements ``open_`` bool [B, n] masked.

        ``logits`` then returns the logits of these N elements. The keys and values go to the cache slots that the
        finished scale will use.
        """
        states, start = self.condition.num_states, state.position
        stop, num_pending = start + ids.shape[1], state.pending.shape[1]
        x = torch.cat([state.pending, self._inputs(ids, start, open_).to(state.pending.dtype)], dim=1)
        # the condition is pending only before the first call of look
        before = start - num_pending if num_pending <= start else -1
        spans: Spans | None = None
        if num_pending:
            own = (slice(num_pending, x.shape[1]), [slice(0, states + stop)])
            spans = [*self._clean_spans(before, start), own]
        slots = torch.arange(states + stop - x.shape[1], states + stop, device=x.device)
        hidden = self._blocks(x, spans, state.cache[..., : states + stop, :], slots, state.memory)
        state.pending = x[:, :0]
        state.hidden = hidden[:, num_pending:][open_]

    def logits(self, state: Any, partial: Tensor) -> Tensor:
        """Logits float32 [N, V] of the open elements' next field, given their fields int64 [N, f] chosen so far."""
        codebook = self.layout.scales[self.scales[state.position]].codebook
        return self._field_logits(state.hidden, codebook, state.position, partial)

    def advance(self, state: Any, element: Tensor) -> None:
        """Append the finished next scale, elements int64 [B, n, F]."""
        finished = self._inputs(element, state.position).to(state.pending.dtype)
        state.pending = torch.cat([state.pending, finished], dim=1)
        state.position += element.shape[1]

    def compile_step(self) -> None:
        raise InputError(
            "sampling.compile=true with prior.order=scale: its steps are of many shapes; set sampling.compile=false"
        )
