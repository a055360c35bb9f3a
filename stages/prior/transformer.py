"""The prior: a decoder-only transformer over any layout of fixed length.

What is notable here:

- pre-norm RMSNorm, SwiGLU, no biases; one token table for each codebook and field, one head for each;
- the states of the condition stand before the tokens, or every layer looks at them by cross-attention;
- the slot that predicts element t holds element t-1 and the position (scale, row, column) of element t: the model is
  told what it is asked for;
- a field is predicted given the earlier fields of its element, so codes of two fields need no joint softmax;
- one code path for training's full pass, prefill and single steps: ``_blocks`` with or without a preallocated cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from data.errors import InputError
from data.layout import TokenLayout, Tokens
from stages.attention import attend
from stages.conditions.config import ConditionConfig
from stages.contract import ConditionStates, Prior, Prompts
from stages.factory import build_condition
from stages.prior.config import PriorConfig


@dataclass
class TransformerPriorConfig(PriorConfig):
    """Decoder-only transformer."""

    kind: str = "transformer"
    depth: int = 12
    """Layers."""
    width: int = 768
    """Features of a token."""
    heads: int = 12
    """Attention heads; must divide the width."""
    hidden_ratio: float = 8 / 3
    """Hidden width of SwiGLU over the width; 8/3 has the parameters of a plain MLP of 4."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    checkpoint_gradients: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class Attention(nn.Module):
    """Causal self-attention with an optional preallocated key-value cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] → [B, L, D], causal without a mask.

        With ``cache`` [2, B, H, T, D/H], keys and values go to its ``slots`` [L], and ``mask`` [L, T] says what counts.
        """
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None and slots is not None:
            cache[0].index_copy_(2, slots, key.to(cache.dtype))
            cache[1].index_copy_(2, slots, value.to(cache.dtype))
            key, value = cache[0].to(query.dtype), cache[1].to(query.dtype)
        mixed = attend(query, key, value, mask, causal=mask is None)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Attention of the sequence to a memory that does not change while it grows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values [2, B, H, M, D/H] of a memory [B, M, D]."""
        batch, length, width = memory.shape
        return self.key_value(memory).view(batch, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, remembered: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]; ``mask`` bool [B, 1, 1, M] says which of the memory counts."""
        batch, length, width = x.shape
        query = self.query(self.norm(x)).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        key, value = remembered.to(query.dtype)
        return self.project(attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm block: attention, cross-attention where the condition gives a memory, and SwiGLU."""

    def __init__(self, config: TransformerPriorConfig, cross: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.cross = CrossAttention(config.width, config.heads) if cross else None
        self.mlp_norm = nn.RMSNorm(config.width)
        hidden = round(config.width * config.hidden_ratio / 8) * 8
        self.mlp = SwiGLU(config.width, hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
        remembered: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; arguments as in ``Attention`` and ``CrossAttention``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, slots))
        if self.cross is not None:
            x = x + self.dropout(self.cross(x, remembered, memory_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


Memory = tuple[Tensor, Tensor]
"""Keys and values [depth, 2, B, H, M, D/H] of the condition's memory, and which count, bool [B, 1, 1, M]."""


class DecodingState:
    """A sequence while it is sampled: how far it is, what was computed, and the last hidden state."""

    def __init__(self, cache: Tensor, position: int, hidden: Tensor, memory: Memory | None) -> None:
        self.cache = cache
        """[depth, 2, B, H, T, D/H]"""
        self.memory = memory
        self.position = position
        """Index of the next element."""
        self.hidden = hidden
        """[B, D], which predicts the next element"""


class TransformerPrior(Prior):
    """Decoder-only transformer. Raises ValueError for a layout of variable length or heads that do not divide."""

    offsets: Tensor
    scale_of: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(
        self,
        config: TransformerPriorConfig,
        condition: ConditionConfig,
        layout: TokenLayout,
        class_names: list[str],
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layout.ends != "fixed" or layout.header:
            raise InputError(f"prior.kind=transformer models layouts of fixed length; this one ends by {layout.ends}")
        if config.width % config.heads:
            raise InputError(f"prior.width={config.width} is no multiple of prior.heads={config.heads}")
        self.config = config
        self.condition_config = condition
        self.layout = layout
        self.class_names = list(class_names)
        self.text = text
        self.condition = build_condition(condition, self.class_names, config.width, text)

        first_row: dict[tuple[int, int], int] = {}
        rows = 0
        for codebook in layout.codebooks:
            for index, part in enumerate(layout.fields_of(codebook)):
                first_row[codebook, index] = rows
                rows += part.vocabulary_size
        self.table = nn.Embedding(rows, config.width)
        self.heads = nn.ModuleDict(
            {
                f"{codebook}-{index}": nn.Linear(config.width, part.vocabulary_size, bias=False)
                for codebook in layout.codebooks
                for index, part in enumerate(layout.fields_of(codebook))
            }
        )
        self.runs = _runs_of_codebooks(layout)
        places = [
            (number, *((divmod(index, scale.grid[1])) if scale.grid else (0, index)), scale.codebook)
            for number, scale in enumerate(layout.scales)
            for index in range(scale.length)
        ]
        offsets = [[first_row[place[3], index] for index in range(layout.num_fields)] for place in places]
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        for name, column in (("scale_of", 0), ("row_of", 1), ("column_of", 2)):
            self.register_buffer(name, torch.tensor([place[column] for place in places]), persistent=False)
        self.scale_embedding = nn.Embedding(len(layout.scales), config.width)
        self.row_embedding = nn.Embedding(1 + max(place[1] for place in places), config.width)
        self.column_embedding = nn.Embedding(1 + max(place[2] for place in places), config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, self.condition.cross) for _ in range(config.depth)])
        self.norm = nn.RMSNorm(config.width)
        self._step = self._prefill
        self._compiled_cache: Tensor | None = None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.project.weight", "cross.project.weight", "mlp.fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.depth) ** 0.5)

    # ------------------------------------------------------------------ the pass

    def _embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """Embeddings [B, n, D] of the elements ids [B, n, F] that stand at ``first`` and after."""
        return self.table(ids + self.offsets[first : first + ids.shape[1]]).sum(2)

    def _position(self, start: int, stop: int) -> Tensor:
        """Embeddings [n, D] of the places of elements ``start`` to ``stop``."""
        part = slice(start, stop)
        return (
            self.scale_embedding(self.scale_of[part])
            + self.row_embedding(self.row_of[part])
            + self.column_embedding(self.column_of[part])
        )

    def _slots(self, states: Tensor, ids: Tensor, upto: int) -> Tensor:
        """Input [B, P + n, D]: states [B, P, D] and elements ids [B, n, F]; the last slot predicts ``upto``."""
        x = torch.cat([states, self._embed(ids).to(states.dtype)], dim=1)
        predicted = self._position(0, upto + 1)
        return x + functional.pad(predicted, (0, 0, x.shape[1] - len(predicted), 0))

    def _remember(self, states: ConditionStates) -> Memory | None:
        """What the layers keep of the condition's memory; None where there is none."""
        if states.memory is None or states.memory_mask is None:
            return None
        remembered = torch.stack([block.cross.remember(states.memory) for block in self.blocks])  # type: ignore[union-attr, operator]
        return remembered, states.memory_mask[:, None, None, :]

    def _blocks(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        x = self.embedding_dropout(x)
        for index, block in enumerate(self.blocks):
            seen = (None, None) if memory is None else (memory[0][index], memory[1])
            if self.config.checkpoint_gradients and self.training and cache is None:
                x = checkpoint(block, x, mask, None, None, *seen, use_reentrant=False)
            else:
                x = block(x, mask, None if cache is None else cache[index], slots, *seen)
        return self.norm(x)

    def _field_logits(self, hidden: Tensor, codebook: int, first: int, chosen: Tensor) -> Tensor:
        """Logits [..., V] of field ``chosen.shape[-1]`` at ``first``, given the fields chosen [..., f]."""
        for index in range(chosen.shape[-1]):
            hidden = hidden + self.table(chosen[..., index] + self.offsets[first, index])
        return self.heads[f"{codebook}-{chosen.shape[-1]}"](hidden).float()

    def nll(self, tokens: Tokens, prompts: Prompts) -> Tensor:
        ids = tokens.ids
        length = ids.shape[1]
        states = self.condition(prompts)
        x = self._slots(states.prefix, ids[:, :-1], length - 1)
        hidden = self._blocks(x, memory=self._remember(states))[:, -length:]
        parts = []
        for codebook, start, stop in self.runs:
            stop = min(stop, length)
            if start >= stop:
                break
            part = ids[:, start:stop]
            parts.append(
                torch.stack(
                    [
                        functional.cross_entropy(
                            self._field_logits(hidden[:, start:stop], codebook, start, part[..., :index]).flatten(0, 1),
                            part[..., index].flatten(),
                            reduction="none",
                        ).view(part.shape[:2])
                        for index in range(part.shape[2])
                    ],
                    dim=-1,
                )
            )
        return torch.cat(parts, dim=1)

    # ------------------------------------------------------------------ one element at a time

    def begin(self, prompts: Prompts, prefix: Tokens | None, length: int) -> DecodingState:
        batch, width = len(prompts), self.config.width // self.config.heads
        ids = prompts.labels.new_zeros(batch, 0, self.layout.num_fields) if prefix is None else prefix.ids
        size = self.condition.num_states + length - 1
        weight = self.table.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (len(self.blocks), 2, batch, self.config.heads, size, width)
        cache = self._compiled_cache
        if cache is None or (cache.shape, cache.dtype, cache.device) != (shape, dtype, weight.device):
            cache = torch.zeros(shape, device=weight.device, dtype=dtype)
            if self._step != self._prefill:
                # a CUDA graph writes to one address: the next batch of the same shape takes the same memory
                torch._dynamo.mark_static_address(cache)
                self._compiled_cache = cache
        states = self.condition(prompts)
        memory = self._remember(states)
        x = self._slots(states.prefix, ids, ids.shape[1])
        hidden = self._prefill(x, torch.arange(x.shape[1], device=x.device), cache, memory)
        return DecodingState(cache, ids.shape[1], hidden, memory)

    def _prefill(self, x: Tensor, slots: Tensor, cache: Tensor, memory: Memory | None) -> Tensor:
        """Last hidden state [B, D] of new slots x [B, n, D], whose keys and values go into the cache."""
        mask = torch.arange(cache.shape[4], device=x.device) <= slots[:, None]
        return self._blocks(x, mask, cache, slots, memory)[:, -1]

    def compile_step(self) -> None:
        """Compile the step of one element: its shapes never change (CUDA graphs on a GPU)."""
        self._step = torch.compile(self._prefill, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def logits(self, state: DecodingState, partial: Tensor) -> Tensor:
        codebook = next(codebook for codebook, _, stop in self.runs if state.position < stop)
        return self._field_logits(state.hidden, codebook, state.position, partial)

    def advance(self, state: DecodingState, element: Tensor) -> None:
        position = state.position
        state.position += 1
        if state.position >= state.cache.shape[4] - self.condition.num_states + 1:
            return  # the last element of the sequence predicts nothing
        x = self._embed(element.unsqueeze(1), position) + self._position(position + 1, position + 2)
        slot = torch.tensor([self.condition.num_states + position], device=element.device)
        # a CUDA graph writes its next result to the same place
        state.hidden = self._step(x, slot, state.cache, state.memory).clone()


def _runs_of_codebooks(layout: TokenLayout) -> list[tuple[int, int, int]]:
    """Consecutive elements of one codebook: (codebook, start, stop)."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for scale in layout.scales:
        stop = start + scale.length
        if runs and runs[-1][0] == scale.codebook:
            runs[-1] = (scale.codebook, runs[-1][1], stop)
        else:
            runs.append((scale.codebook, start, stop))
        start = stop
    return runs
