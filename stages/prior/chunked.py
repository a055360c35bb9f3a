"""Chunked prior over lists: an encoder sees the known elements as an image, decoders write the next chunk.

After *Generating Images with Sparse Representations* (Nash et al., arXiv 2103.03841, section 4). Design notes:

- only the encoder sees the whole image, and its cost grows with the number of blocks; the decoders see one chunk of the
  list and a few elements before it, however long the list is;
- three decoders are stacked: channel, then position given the channel, then value given both. The value decoder also
  receives the encoder's features at that position;
- training uses one chunk of each list at a time, early chunks more often; evaluation uses all chunks;
- branches are scaled by learned factors that start at zero, as in the paper. The paper uses fewer attention than
  feed-forward layers (PAR-Transformer); here every layer has both. The paper does not give its layer sizes; the
  default sizes, chunk and overlap are those of a reimplementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from stages.conditions.config import ConditionConfig
from stages.contract import FORBIDDEN, Prior, PriorOutput, Prompts
from stages.factory import build_condition, build_grammar
from stages.grammar import GrammarState
from stages.lists import ListGrammar
from stages.prior.blocks import Block, Decoder, cache_dtype
from stages.prior.config import ChunkedPriorConfig
from stages.prior.dense import DenseImage
from stages.prior.judge import judge

KNOWN_CHUNKS = 64
"""Number of chunk embeddings; all later chunks share the last one."""


@dataclass
class _Memory:
    """Encoded elements before a chunk, and the condition, as the decoders see them."""

    features: Tensor
    """Encoder features of the patches, [B, patches, D]."""
    remembered: list[Tensor]
    """For each decoder, the keys and values of its layers: [depth, 2, B, H, M, D/H]."""
    mask: Tensor | None
    """bool [B, 1, 1, M]: which of the M states to attend to; None for all."""
    summary: Tensor
    """[B, 1, D]: features of condition and header, added to every slot."""


class ListState:
    """State of a batch of lists during sampling; all rows have the same length."""

    def __init__(self, ids: Tensor, prompts: Prompts, header: Tensor, stream: GrammarState, length: int) -> None:
        self.ids = ids
        """Elements so far, int64 [B, n, 3]."""
        self.prompts, self.header, self.stream, self.length = prompts, header, stream, length
        self.memory: _Memory | None = None
        self.caches: list[Tensor] = []
        """Key-value cache of each decoder, [depth, 2, B, H, overlap + chunk, D/H]."""
        self.hidden: list[Tensor] = []
        """Hidden states [B, D] for the next element, one per decoder that has already run on it."""

    @property
    def position(self) -> int:
        """Index of the next element."""
        return self.ids.shape[1]


class ChunkedPrior(Prior):
    """Prior over lists of (channel, position, value). Raises ValueError for other layouts and for invalid sizes."""

    grammar: ListGrammar

    def __init__(
        self,
        config: ChunkedPriorConfig,
        condition: ConditionConfig,
        layout: TokenLayout,
        class_names: list[str],
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layout.grammar is None or layout.grammar["kind"] != "list":
            raise InputError("prior.kind=chunked models lists (tokenizer.kind=sparse-dct); set prior.kind=transformer")
        if config.width % config.heads:
            raise InputError(
                f"prior.width={config.width} is no multiple of prior.heads={config.heads}; change one of them"
            )
        if config.overlap < 1 or config.chunk < 1:
            raise InputError(f"prior.chunk={config.chunk}, prior.overlap={config.overlap}; allowed: 1 or more each")
        grammar = build_grammar(layout, order=config.order)
        assert isinstance(grammar, ListGrammar)
        self.config, self.condition_config, self.layout, self.grammar = config, condition, layout, grammar
        self.class_names, self.text, self.order = list(class_names), text, config.order
        width = config.width
        self.condition = build_condition(condition, self.class_names, width, text)
        self.dense = DenseImage(grammar, config.patch)
        rows, columns = grammar.grids[0]
        # the last entry of each table stands for "before the list"
        self.channel = nn.Embedding(grammar.end + 2, width)
        self.row, self.column = nn.Embedding(rows + 1, width), nn.Embedding(columns + 1, width)
        self.value = nn.Embedding(2 * grammar.largest + 2, width)
        self.chosen_channel = nn.Embedding(grammar.end + 2, width)
        self.chosen_row, self.chosen_column = nn.Embedding(rows + 1, width), nn.Embedding(columns + 1, width)
        self.slot = nn.Embedding(config.overlap + config.chunk, width)
        self.chunk = nn.Embedding(KNOWN_CHUNKS, width)
        self.header = nn.ModuleList([nn.Embedding(part.vocabulary_size, width) for part in layout.header])
        self.summary = nn.Linear(width, width)
        self.patches = nn.Linear(self.dense.width, width)
        self.patch_row, self.patch_column = (nn.Embedding(side, width) for side in self.dense.grid)
        self.frontier = nn.Embedding(grammar.end + 2, width)
        sizes = (width, config.heads, config.hidden_ratio, config.dropout)
        self.encoder = nn.ModuleList([Block(*sizes, causal=False, gated=True) for _ in range(config.encoder_depth)])
        depths = (config.channel_depth, config.position_depth, config.value_depth)
        self.encoder_norm = nn.RMSNorm(width)
        vocabularies = (grammar.end + 1, grammar.num_positions, 2 * grammar.largest + 1)
        decoders = [Decoder(depth, sizes, size) for depth, size in zip(depths, vocabularies, strict=True)]
        self.channel_decoder, self.position_decoder, self.value_decoder = decoders
        self.embedding_dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def decoders(self) -> tuple[Decoder, Decoder, Decoder]:
        """The decoders, in the order of the fields."""
        return self.channel_decoder, self.position_decoder, self.value_decoder

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Layers that see a chunk of a list (decoders), and layers that see the whole image (encoder)."""
        return {"decoders": [*self.decoders], "encoder": [self.patches, *self.encoder, self.encoder_norm]}

    # ------------------------------------------------------------------ order

    def to_own_order(self, tokens: Tokens, whole: Sequence[int] = ()) -> Tokens:
        return self.grammar.sort(tokens)[0]

    def to_layout_order(self, tokens: Tokens) -> Tokens:
        return self.grammar.sort_naturally(tokens)

    # ------------------------------------------------------------------ encoder

    def _encode(self, past: Tokens, prompts: Prompts) -> _Memory:
        """Encode the elements ``past`` that precede a chunk."""
        values = self.dense(past)
        # values span two orders of magnitude and most are 1; the paper does not give its scaling
        x = self.patches(values.sign() * values.abs().log1p())
        place = self.patch_row.weight[:, None] + self.patch_column.weight
        last = (past.lengths - 1).clamp(min=0)[:, None]
        frontier = past.ids[..., 0].gather(1, last)[:, 0] if past.ids.shape[1] else last[:, 0]
        frontier = torch.where(past.lengths > 0, frontier, self.grammar.end + 1)
        x = x + place.flatten(0, 1) + self.frontier(frontier)[:, None]
        states = self.condition(prompts)
        condition_states, counts = states.prefix, states.prefix.new_ones(states.prefix.shape[:2], dtype=torch.bool)
        if states.memory is not None and states.memory_mask is not None:
            condition_states, counts = (
                torch.cat([condition_states, states.memory], dim=1),
                torch.cat([counts, states.memory_mask], dim=1),
            )
        summary = (condition_states * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True).clamp(min=1)
        common = self.summary(summary)
        for table, field, part in zip(self.header, self.layout.header, past.header.unbind(1), strict=True):
            if not 0 <= int(part.min()) <= int(part.max()) < field.vocabulary_size:
                raise InputError(
                    f"the header has {field.name} {part.tolist()}; allowed: 0 to {field.vocabulary_size - 1}"
                )
            common = common + table(part)
        x = self.embedding_dropout(torch.cat([x, condition_states.to(x.dtype)], dim=1))
        mask = None
        if not counts.all():
            mask = torch.cat([counts.new_ones(len(x), self.dense.num_patches), counts], dim=1)[:, None, None]
        for block in self.encoder:
            x = block(x, mask)
        x = self.encoder_norm(x)
        remembered = [decoder.remember(x) for decoder in self.decoders]
        return _Memory(x[:, : self.dense.num_patches], remembered, mask, common.unsqueeze(1))

    # ------------------------------------------------------------------ decoders

    def _before(self, elements: Tensor, slots: Tensor, starts: Tensor, in_list: Tensor, memory: _Memory) -> Tensor:
        """Input [B, n, D] of the channel decoder from the elements [B, n, 3] that precede the slots of a window.

        A window is the overlap and the chunk. ``slots`` [n] are indices in the window, ``starts`` [B] are the chunks'
        first elements, and ``there`` bool [B, n] is False for elements before the start of the list.
        """
        channel, position, value = elements.unbind(-1)
        x = self.channel(channel.masked_fill(~in_list, self.grammar.end + 1)) + self._place(
            self.row, self.column, channel, position, in_list
        )
        x = x + self.value(value.masked_fill(~in_list, 2 * self.grammar.largest + 1))
        chunks = (starts // self.config.chunk).clamp(max=KNOWN_CHUNKS - 1)
        x = x + self.slot(slots) + self.chunk(chunks)[:, None] + memory.summary
        return self.embedding_dropout(x)

    def _place(
        self, rows: nn.Embedding, columns: nn.Embedding, channel: Tensor, position: Tensor, in_list: Tensor
    ) -> Tensor:
        row = self.dense.row_of[channel, position].masked_fill(~in_list, rows.num_embeddings - 1)
        column = self.dense.column_of[channel, position].masked_fill(~in_list, columns.num_embeddings - 1)
        return rows(row) + columns(column)

    def _given(self, field: int, hidden: Tensor, elements: Tensor, in_list: Tensor, memory: _Memory) -> Tensor:
        """Input of the decoder of ``field`` 1 or 2: the previous decoder's hidden states plus the previous field."""
        channel = elements[..., 0]
        if field == 1:
            return hidden + self.chosen_channel(channel.masked_fill(~in_list, self.grammar.end + 1))
        position = elements[..., 1]
        patch = self.dense.patch_of[channel, position]
        features = memory.features.gather(1, patch.unsqueeze(-1).expand(-1, -1, memory.features.shape[-1]))
        # the feature belongs to a patch; the place embedding identifies the block within the patch
        place = self._place(self.chosen_row, self.chosen_column, channel, position, in_list)
        return hidden + features * in_list.unsqueeze(-1) + place

    def _run(
        self, before: Tensor, elements: Tensor, in_list: Tensor, memory: _Memory, slots: Tensor, caches: list[Tensor]
    ) -> list[Tensor]:
        """Hidden states [B, n, D] of each decoder for windows of complete elements [B, n, 3].

        ``before`` is the input of the first decoder, and ``there`` bool [B, n] is False before the start of the list.
        ``caches``, if not empty, are written at ``slots``.
        """
        hidden: list[Tensor] = []
        for field, decoder in enumerate(self.decoders):
            x = self._given(field, hidden[-1], elements, in_list, memory) if field else before
            cache = (caches[field], slots) if caches else (None, None)
            hidden.append(decoder(x, memory.remembered[field], memory.mask, *cache))
        return hidden

    # ------------------------------------------------------------------ whole lists

    def forward(self, tokens: Tokens, prompts: Prompts) -> PriorOutput:
        """Score every element; in training only one chunk of each list, which ``judged`` of the output marks."""
        arranged, source_index = self.grammar.sort(tokens)
        arranged.notes = self.grammar.annotate(arranged)
        shape, chunk = tokens.ids.shape[:2], self.config.chunk
        scores = torch.zeros(5, *shape, device=tokens.ids.device)
        judged = torch.zeros(shape, dtype=torch.bool, device=tokens.ids.device)
        if self.training:
            passes = [self._drawn_chunks(tokens.lengths) * chunk]
        else:
            passes = [torch.full_like(tokens.lengths, start) for start in range(0, shape[1], chunk)]
        all_scores = torch.arange(5, device=tokens.ids.device)[:, None]
        for starts in passes:
            rows = (starts < tokens.lengths).nonzero()[:, 0]
            if not len(rows):
                continue
            places, in_chunk, values = self._judge_chunk(arranged[rows], prompts[rows], starts[rows])
            # back to the elements' positions in ``tokens``; no two passes write to the same element
            row, place = rows[:, None].expand_as(places)[in_chunk], source_index[rows].gather(1, places)[in_chunk]
            judged[row, place] = True
            scores = scores.index_put((all_scores, row, place), values[:, in_chunk])
        return PriorOutput(scores[:3].movedim(0, -1), scores[3], scores[4].detach(), judged if self.training else None)

    def _drawn_chunks(self, lengths: Tensor) -> Tensor:
        """Index of one random chunk of each list, distributed by ``early_bias``: int64 [B]."""
        counts = (-(-lengths // self.config.chunk)).clamp(min=1)
        numbers = torch.arange(int(counts.max()), device=lengths.device)
        weights = (1.0 + numbers) ** -self.config.early_bias * (numbers < counts[:, None])
        return weights.multinomial(1)[:, 0]

    def _judge_chunk(self, tokens: Tokens, prompts: Prompts, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score the chunks that begin at ``starts`` [B] of sorted lists.

        Returns (places int64 [B, n], in_chunk bool [B, n], values float32 [5, B, n]): the elements' positions in their
        lists, which of them belong to the chunk, and their nll of the three fields, legal_nll and saved.
        """
        overlap, length = self.config.overlap, tokens.ids.shape[1]
        past = Tokens(tokens.ids, torch.minimum(starts, tokens.lengths), tokens.header)
        longest = int(past.lengths.max())
        memory = self._encode(past.prefix(longest), prompts)
        ends = torch.minimum(starts + self.config.chunk, tokens.lengths)
        count = max(1, int((ends - starts).max()))
        slots = torch.arange(overlap + count, device=starts.device)
        at = starts[:, None] + slots - overlap
        clamped = at.clamp(0, length - 1) if length else torch.zeros_like(at)

        def gathered(values: Tensor, places: Tensor) -> Tensor:
            return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

        elements = gathered(tokens.ids, clamped)
        previous = gathered(tokens.ids, (clamped - 1).clamp(min=0))
        before = self._before(previous, slots, starts, at > 0, memory)
        hidden = self._run(before, elements, at >= 0, memory, slots, [])
        places, in_chunk = clamped[:, overlap:], (at < ends[:, None])[:, overlap:]
        assert tokens.notes is not None
        notes, targets = gathered(tokens.notes, places), elements[:, overlap:]
        scores: list[tuple[Tensor, ...]] = []
        for field, decoder in enumerate(self.decoders):
            allowed, loosely = (self.grammar.allowed(notes, targets[..., :field], strict) for strict in (True, False))
            logits = decoder.logits(hidden[field][:, overlap:])
            scores.append(judge(logits, targets[..., field], allowed, loosely, in_chunk))
        nll, legal, saved = (torch.stack(parts) for parts in zip(*scores, strict=True))
        return places, in_chunk, torch.cat([nll, legal.sum(0, keepdim=True), saved.sum(0, keepdim=True)])

    # ------------------------------------------------------------------ one element at a time

    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int, whole: Sequence[int] = ()) -> ListState:
        batch = len(prompts)
        if prefix is None:
            if self.layout.header:
                raise InputError("got no prefix, but these lists begin with a header; give it as the prefix")
            prefix = Tokens.fixed(prompts.labels.new_zeros(batch, 0, 3))
        stream = self.grammar.follow(prefix)
        self.grammar.close(stream, whole)
        state = ListState(prefix.ids, prompts, prefix.header, stream, length)
        self._open_chunk(state)
        return state

    def _open_chunk(self, state: ListState) -> None:
        """Encode the elements before the current chunk, and run the decoders on the overlap and the chunk so far."""
        config, ids, position = self.config, state.ids, state.position
        start = position // config.chunk * config.chunk
        lengths = torch.full((len(ids),), start, dtype=torch.int64, device=ids.device)
        memory = self._encode(Tokens(ids[:, :start], lengths, state.header), state.prompts)
        size = min(config.chunk, max(1, state.length - start)) + config.overlap
        dtype = cache_dtype(self.encoder_norm.weight)
        shape = (2, len(ids), config.heads, size, config.width // config.heads)
        state.memory = memory
        state.caches = [
            torch.zeros(len(decoder.blocks), *shape, device=ids.device, dtype=dtype) for decoder in self.decoders
        ]
        slots = torch.arange(config.overlap + position - start, device=ids.device)
        at = (start - config.overlap + slots).expand(len(ids), -1)
        if at.shape[1] and ids.shape[1]:
            elements = ids[:, at[0].clamp(min=0)]
            previous = ids[:, (at[0] - 1).clamp(min=0)]
        else:
            elements = previous = ids.new_zeros(*at.shape, 3)
        before = self._before(previous, slots, lengths, at > 0, memory)
        self._run(before, elements, at >= 0, memory, slots, state.caches)
        self._step(state, ids[:, :0])

    def _step(self, state: ListState, partial: Tensor) -> None:
        """Run the next field's decoder on the next element, whose known fields are ``partial`` [B, f]."""
        memory, field = state.memory, len(state.hidden)
        assert memory is not None
        batch, device = len(state.ids), state.ids.device
        start = state.position // self.config.chunk * self.config.chunk
        slots = torch.tensor([state.position - start + self.config.overlap], device=device)
        if field == 0:
            in_list = torch.full((batch, 1), state.position > 0, device=device)
            previous = state.ids[:, -1:] if state.position else state.ids.new_zeros(batch, 1, 3)
            starts = torch.full((batch,), start, device=device)
            x = self._before(previous, slots, starts, in_list, memory)
        else:
            in_list = torch.ones(batch, 1, dtype=torch.bool, device=device)
            x = self._given(field, state.hidden[-1].unsqueeze(1), partial.unsqueeze(1), in_list, memory)
        hidden = self.decoders[field](x, memory.remembered[field], memory.mask, state.caches[field], slots)
        state.hidden.append(hidden[:, 0])

    def logits(self, state: ListState, partial: Tensor) -> Tensor:
        field = partial.shape[1]
        while len(state.hidden) <= field:
            self._step(state, partial)
        allowed = self.grammar.allowed_next(state.stream, partial).to(partial.device)
        return self.decoders[field].logits(state.hidden[field]).masked_fill(~allowed, FORBIDDEN)

    def advance(self, state: ListState, element: Tensor) -> None:
        while len(state.hidden) < 3:
            self._step(state, element)
        self.grammar.advance(state.stream, element)
        state.ids = torch.cat([state.ids, element.unsqueeze(1)], dim=1)
        state.hidden = []
        if state.position >= state.length or not state.stream.going.any():
            return
        if state.position % self.config.chunk:
            self._step(state, element[:, :0])
        else:
            self._open_chunk(state)

    def ended(self, state: ListState, num_scales: int) -> Tensor:
        return ~state.stream.going | (self.grammar.reached(state.stream.notes) >= num_scales).cpu()
