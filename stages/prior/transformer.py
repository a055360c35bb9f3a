"""Decoder-only transformer prior for layouts of fixed length and for streams with a grammar.

Design notes:

- pre-norm RMSNorm, SwiGLU, no biases; one head per codebook and field;
- an input embedding embeds elements and places (``stages/prior/embeddings.py``);
- condition states are a prefix of the sequence, or every layer attends to them by cross-attention;
- the slot that predicts element t holds element t-1 and the position (scale, row, column) of element t, so the model
  knows which element it predicts in any order;
- the order is a permutation stored with the weights; input and output tokens are in the layout's order;
- each field is predicted given the earlier fields of its element, so codes with two fields need no joint softmax;
- between layers, half of the features can become moving averages (``stages/prior/averaging.py``);
- training, prefill and single steps share one code path: ``_blocks`` with or without a preallocated cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from stages.attention import Spans
from stages.conditions.config import ConditionConfig
from stages.contract import FORBIDDEN, ConditionStates, Prior, PriorOutput, Prompts
from stages.factory import build_condition, build_grammar
from stages.grammar import GrammarState, PlacedGrammar
from stages.prior.averaging import MovingAverages, segments_of
from stages.prior.blocks import Block, cache_dtype
from stages.prior.config import TransformerPriorConfig
from stages.prior.embeddings import GridEmbedding, InputEmbedding, StreamEmbedding
from stages.prior.judge import judge
from stages.prior.order import permutation_of, reordered, scales_of

FIRST_SLOTS = 256
"""Initial slots of a stream's key-value cache; the cache doubles when it is full."""


Memory = tuple[Tensor, Tensor]
"""Keys and values [depth, 2, B, H, M, D/H] of the condition's memory, and its mask bool [B, 1, 1, M]."""


class DecodingState:
    """State of a batch of sequences during sampling: position, caches and last hidden state."""

    def __init__(
        self,
        cache: Tensor,
        position: int,
        hidden: Tensor,
        memory: Memory | None,
        common: Tensor | None = None,
        stream: GrammarState | None = None,
        averaged: list[Tensor] | None = None,
    ) -> None:
        self.averaged = averaged
        """State of the moving averages, [B, 1 + T, D / 2] per layer; None without them."""
        self.cache = cache
        """Keys and values [depth, 2, B, H, T, D/H]; T grows in streams."""
        self.memory = memory
        self.common = common
        """Features [B, 1, D] added to every slot, or None."""
        self.stream = stream
        """State of the grammar, or None without a grammar."""
        self.position = position
        """Index of the next element."""
        self.hidden = hidden
        """Hidden state [B, D] that predicts the next element."""


class TransformerPrior(Prior):
    """Decoder-only transformer. Raises ValueError for layouts of lists, or if ``heads`` does not divide ``width``."""

    permutation: Tensor
    """int64 [L]: layout element at each position of the prior's order."""
    positions: Tensor
    """int64 [L]: inverse of ``permutation``."""
    causal = True
    """Whether a slot attends only to itself and earlier slots."""

    def __init__(
        self,
        config: TransformerPriorConfig,
        condition: ConditionConfig,
        layout: TokenLayout,
        class_names: list[str],
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if config.width % config.heads:
            raise InputError(
                f"prior.width={config.width} is no multiple of prior.heads={config.heads}; change one of them"
            )
        self.config = config
        self.condition_config = condition
        self.layout = layout
        self.class_names = list(class_names)
        self.text = text
        self.condition = build_condition(condition, self.class_names, config.width, text)
        self.grammar = build_grammar(layout)
        self.order = config.order
        self.written = permutation_of(layout, self.order)
        """``permutation`` as a list."""
        if self.grammar is None:
            self.register_buffer("permutation", torch.tensor(self.written))
            inverse = sorted(self.written, key=self.written.__getitem__)
            self.register_buffer("positions", torch.tensor(inverse), persistent=False)
        if not (self.grammar is None or isinstance(self.grammar, PlacedGrammar)):
            raise InputError(
                "prior.kind=transformer needs the place of each element in advance, which lists do not give; set "
                "prior.kind=chunked"
            )
        self.inputs: InputEmbedding = (
            GridEmbedding(layout, config.width, self.written)
            if self.grammar is None
            else StreamEmbedding(layout, self.grammar, config.width, config.context)
        )
        self.heads = nn.ModuleDict(
            {
                f"{codebook}-{index}": nn.Linear(config.width, part.vocabulary_size, bias=False)
                for codebook in layout.codebooks
                for index, part in enumerate(layout.fields_of(codebook))
            }
        )
        self.scales = scales_of(layout, self.written) if self.grammar is None else []
        """Scale at each position."""
        self.codebook_places = _places_of_codebooks(layout, self.scales)
        self.embedding_dropout = nn.Dropout(config.dropout)
        sizes = (config.width, config.heads, config.hidden_ratio, config.dropout, self.condition.cross)
        self.blocks = nn.ModuleList([Block(*sizes, causal=self.causal) for _ in range(config.depth)])
        self.averages: nn.ModuleList | None = None
        if config.averaging != "none":
            own = layout if config.averaging_borders == "sample" else reordered(layout, self.written)
            segments = segments_of(own, self.condition.num_states, self.max_length, config.averaging_borders)
            averages = (config.averaging, config.width, segments, config.averaging_longest)
            self.averages = nn.ModuleList([MovingAverages(*averages) for _ in range(config.depth)])
        self.norm = nn.RMSNorm(config.width)
        self._step = self._prefill
        self._compiled_cache: Tensor | None = None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.project.weight", "cross.project.weight", "mlp.fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.depth) ** 0.5)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        key, errors = f"{prefix}permutation", args[-1]
        if self.grammar is None and key not in state and self.order == "natural":
            state[key] = self.permutation  # weights saved before orders were stored
        elif self.grammar is None and key not in state:
            errors.append(f"prior.order={self.order} was trained before orders were stored; train it again")
        elif self.grammar is None and not torch.equal(state[key].cpu(), self.permutation.cpu()):
            errors.append(f"its stored order is not prior.order={self.order} of this version; train it again")
        super()._load_from_state_dict(state, prefix, *args)

    # ------------------------------------------------------------------ the pass

    def _slots(self, states: Tensor, ids: Tensor, notes: Tensor | None, common: Tensor | None) -> Tensor:
        """Input [B, P + n, D] from condition states [B, P, D] and elements ids [B, n, F]; the last slot predicts
        element n.

        ``notes`` [B, n + 1, ...] include those of the predicted element.
        """
        count = ids.shape[1]
        elements = self.inputs.elements(ids, 0, None if notes is None else notes[:, :count])
        x = torch.cat([states, elements.to(states.dtype)], dim=1)
        predicted = self.inputs.places(0, count + 1, notes)
        x = x + functional.pad(predicted, (0, 0, x.shape[1] - predicted.shape[-2], 0))
        return x if common is None else x + common

    def _remember(self, states: ConditionStates) -> Memory | None:
        """Keys and values of the condition's memory for all layers; None without a memory."""
        if states.memory is None or states.memory_mask is None:
            return None
        remembered = torch.stack([block.remember(states.memory) for block in self.blocks])  # type: ignore[operator]
        return remembered, states.memory_mask[:, None, None, :]

    def _blocks(
        self,
        x: Tensor,
        mask: Tensor | Spans | None = None,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
        memory: Memory | None = None,
        averaged: list[Tensor] | None = None,
    ) -> Tensor:
        x = self.embedding_dropout(x)
        for index, block in enumerate(self.blocks):
            layer_memory = (None, None) if memory is None else (memory[0][index], memory[1])
            if self.config.checkpoint_gradients and self.training and cache is None:
                x = checkpoint(block, x, mask, None, None, *layer_memory, use_reentrant=False)
            else:
                x = block(x, mask, None if cache is None else cache[index], slots, *layer_memory)
            if self.averages is not None:
                x = self.averages[index](x, None if averaged is None else averaged[index], slots)
        return self.norm(x)

    def _field_logits(self, hidden: Tensor, codebook: int, first: int, chosen: Tensor) -> Tensor:
        """Logits float32 [..., V] of field f = ``chosen.shape[-1]`` at ``first``, given the chosen fields [..., f]."""
        return self.heads[f"{codebook}-{chosen.shape[-1]}"](self.inputs.fields(hidden, first, chosen)).float()

    @property
    def max_length(self) -> int:
        return self.layout.length if self.grammar is None else min(self.layout.length, self.config.max_length)

    def scale_at(self, position: int) -> int:
        return self.scales[position]

    def to_own_order(self, tokens: Tokens, whole: Sequence[int] = ()) -> Tokens:
        count = tokens.ids.shape[1]
        if self.grammar is not None or not count:
            return tokens
        if count == self.layout.length:
            return tokens if self.writes_prefixes else replace(tokens, ids=tokens.ids[:, self.permutation])
        given = [element for element in range(self.layout.length) if self.layout.scale_at(element) in whole]
        given = given or list(range(count))
        if given != sorted(self.written[:count]):
            remedy = "give its first scales" if self.writes_prefixes else "train a prior with prior.order=natural"
            raise InputError(
                f"prior.order={self.order} writes other elements before these, so they cannot be given to it; {remedy}"
            )
        return replace(tokens, ids=tokens.ids[:, [given.index(element) for element in self.written[:count]]])

    def to_layout_order(self, tokens: Tokens) -> Tokens:
        count = tokens.ids.shape[1]
        if self.writes_prefixes or not count:
            return tokens
        return replace(tokens, ids=tokens.ids[:, self.permutation[:count].argsort()])

    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        tokens = tokens.prefix(self.max_length)
        if not self.writes_prefixes and tokens.ids.shape[1] < self.layout.length:
            raise InputError(
                f"{tokens.ids.shape[1]} of {self.layout.length} elements; allowed with prior.order={self.order}: all"
            )
        output = self._forward(self.to_own_order(tokens), prompts)
        if self.order == "natural":
            return output
        confidence, hit = (
            None if values is None else values[:, self.positions] for values in (output.confidence, output.hit)
        )
        return replace(output, nll=output.nll[:, self.positions], confidence=confidence, hit=hit)

    def _forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """Score tokens that are in the prior's own order."""
        notes = tokens.notes
        if self.grammar is not None and notes is None:
            notes = self.grammar.annotate(tokens).to(tokens.ids.device)
        ids = tokens.ids
        length = ids.shape[1]
        states = self.condition(prompts)
        if not length:
            # no elements to score, but with several processes the backward pass must reach every weight
            hidden = self._blocks(states.prefix, memory=self._remember(states))
            others = [parameter for name, parameter in self.named_parameters() if not name.startswith("blocks.")]
            empty = torch.zeros(ids.shape, device=ids.device) + 0 * sum(part.sum() for part in (hidden, *others))
            return PriorOutput(empty, empty[..., 0], empty[..., 0])
        x = self._slots(states.prefix, ids[:, :-1], notes, self.inputs.common(tokens.header, states))
        hidden = self._blocks(x, memory=self._remember(states))[:, -length:]
        if self.grammar is not None and notes is not None:
            logits = self._field_logits(hidden, self.layout.codebooks[0], 0, ids[..., :0])
            no_fields = ids[..., :0]
            allowed, loosely = (self.grammar.allowed(notes, no_fields, strict) for strict in (True, False))
            nll, legal_nll, saved = judge(logits, ids[..., 0], allowed, loosely, tokens.counted)
            return PriorOutput(nll.unsqueeze(-1), legal_nll, saved)
        costs: list[Tensor] = []
        confidences: list[Tensor] = []
        hits: list[Tensor] = []
        judged: list[int] = []
        for codebook, all_places in self.codebook_places.items():
            places = [place for place in all_places if place < length]
            if not places:
                continue
            judged += places
            selection: Any = slice(places[0], places[-1] + 1)
            if selection.stop - selection.start > len(places):
                selection = torch.tensor(places, device=ids.device)
            ids_here, hidden_here = ids[:, selection], hidden[:, selection]
            for index in range(ids_here.shape[2]):
                logits = self._field_logits(hidden_here, codebook, places[0], ids_here[..., :index])
                targets = ids_here[..., index]
                losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                costs.append(losses.view(targets.shape))
                if not self.training:
                    top_logit, top_id = logits.max(-1)
                    confidences.append((top_logit - logits.logsumexp(-1)).exp())
                    hits.append(top_id == targets)

        def in_order(values: list[Tensor]) -> Tensor:
            """Values of all codebooks [B, L, F], in the order of the elements."""
            fields = range(ids.shape[2])
            joined = torch.stack([torch.cat(values[field :: len(fields)], dim=1) for field in fields], dim=-1)
            return joined if judged == sorted(judged) else joined[:, torch.tensor(judged, device=ids.device).argsort()]

        if self.training:
            return PriorOutput(in_order(costs))
        return PriorOutput(in_order(costs), confidence=in_order(confidences), hit=in_order(hits))

    # ------------------------------------------------------------------ one element at a time

    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> DecodingState:
        batch = len(prompts)
        ids = prompts.labels.new_zeros(batch, 0, self.layout.num_fields) if prefix is None else prefix.ids
        states = self.condition(prompts)
        notes = common = stream = None
        if self.grammar is not None:
            if prefix is None:
                raise InputError("got no prefix, but a stream begins with its header; give it as the prefix")
            stream = self.grammar.start(prefix.header)
            all_notes = [stream.notes.clone()]
            for position in range(ids.shape[1]):
                self.grammar.advance(stream, ids[:, position])
                all_notes.append(stream.notes.clone())
            notes = torch.stack(all_notes, dim=1).to(ids.device)
            common = self.inputs.common(prefix.header, states)
        memory = self._remember(states)
        x = self._slots(states.prefix, ids, notes, common)
        cache = self._allocate(batch, self.condition.num_states + length - 1, x.shape[1])
        averaged = None
        if self.averages is not None:
            averaged = [layer.room(batch, cache.shape[4], x.device) for layer in self.averages]  # type: ignore[operator]
        slots = torch.arange(x.shape[1], device=x.device)
        hidden = self._prefill(x, slots, cache[..., : x.shape[1], :], memory, averaged)
        return DecodingState(cache, ids.shape[1], hidden, memory, common, stream, averaged)

    @property
    def _compiled(self) -> bool:
        return self._step != self._prefill

    def _allocate(self, batch: int, size: int, filled: int) -> Tensor:
        """Cache for the keys and values of ``size`` slots; streams start with a smaller one, as most end early."""
        weight = self.norm.weight
        dtype = cache_dtype(weight)
        if self.grammar is not None and not self._compiled:
            size = min(size, max(FIRST_SLOTS, 2 * filled))
        width = self.config.width // self.config.heads
        shape = (len(self.blocks), 2, batch, self.config.heads, size, width)
        cache = self._compiled_cache
        if cache is None or (cache.shape, cache.dtype, cache.device) != (shape, dtype, weight.device):
            cache = torch.zeros(shape, device=weight.device, dtype=dtype)
            if self._compiled:
                # a CUDA graph writes to a fixed address, so the next batch of the same shape reuses this memory
                torch._dynamo.mark_static_address(cache)
                self._compiled_cache = cache
        return cache

    def _prefill(
        self, x: Tensor, slots: Tensor, cache: Tensor, memory: Memory | None, averaged: list[Tensor] | None = None
    ) -> Tensor:
        """Last hidden state [B, D] of new slots x [B, n, D]; their keys and values are written to the cache."""
        mask = torch.arange(cache.shape[4], device=x.device) <= slots[:, None]
        return self._blocks(x, mask, cache, slots, memory, averaged)[:, -1]

    def compile_step(self) -> None:
        """Compile the single-element step, whose shapes never change (CUDA graphs on a GPU)."""
        self._step = torch.compile(self._prefill, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def logits(self, state: DecodingState, partial: Tensor) -> Tensor:
        codebook = self.layout.scales[self.scales[state.position] if self.scales else 0].codebook
        logits = self._field_logits(state.hidden, codebook, state.position, partial)
        if self.grammar is None or state.stream is None:
            return logits
        allowed = self.grammar.allowed(state.stream.notes, partial).to(logits.device)
        return logits.masked_fill(~allowed, FORBIDDEN)

    def ended(self, state: DecodingState, num_scales: int) -> Tensor | None:
        if self.grammar is None or state.stream is None:
            return None
        return ~state.stream.going | (self.grammar.reached(state.stream.notes) >= num_scales)

    def advance(self, state: DecodingState, element: Tensor) -> None:
        position = state.position
        state.position += 1
        slot = self.condition.num_states + position
        before = after = None
        if self.grammar is not None and state.stream is not None:
            before = state.stream.notes.clone().unsqueeze(1).to(element.device)
            self.grammar.advance(state.stream, element)
            after = state.stream.notes.clone().unsqueeze(1).to(element.device)
            if state.position >= self.max_length or not state.stream.going.any():
                return
            if slot >= state.cache.shape[4]:
                num_new = state.cache.shape[4]
                state.cache = functional.pad(state.cache, (0, 0, 0, num_new))
                if state.averaged is not None:
                    state.averaged = [functional.pad(room, (0, 0, 0, num_new)) for room in state.averaged]
        elif slot >= state.cache.shape[4]:
            return  # the last element of the sequence predicts nothing
        x = self.inputs.elements(element.unsqueeze(1), position, before)
        x = x + self.inputs.places(position + 1, position + 2, after)
        x = x if state.common is None else x + state.common
        slots = torch.tensor([slot], device=element.device)
        # a compiled step needs a fixed shape; otherwise skip the slots that are still empty
        cache = state.cache if self._compiled else state.cache[..., : slot + 1, :]
        # clone, because a CUDA graph overwrites its result in the next step
        state.hidden = self._step(x, slots, cache, state.memory, state.averaged).clone()


def _places_of_codebooks(layout: TokenLayout, scales: Sequence[int]) -> dict[int, list[int]]:
    """Positions of each codebook's elements, given the scale at each position."""
    return {
        codebook: [place for place, scale in enumerate(scales) if layout.scales[scale].codebook == codebook]
        for codebook in layout.codebooks
    }
