"""The transformer of stage 1: ADTransformer blocks with joint attention, dense or as a mask says.

SIT (arXiv 2412.09607): tokens of the approximation and of the details form one sequence with one joint attention, but
queries, keys, values, norms and MLP of every layer are separate. The attention's output projection is not mentioned
there; it is separate here, like all other weights. With one group the same code is the plain transformer of ViT-VQGAN
and of nested tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.errors import InputError
from stages.attention import attend
from stages.layers import FusedLinear, HiddenLayers
from stages.tokenizer.parts import TransformerConfig


class Grouped(nn.ModuleList):
    """One module for each group of tokens; applied to consecutive runs of the sequence."""

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """[B, L, D] → [B, L, D']; ``lengths`` are the groups' run lengths and may end early with a prefix."""
        if len(lengths) == 1:
            return self[0](x)
        return torch.cat([module(part) for module, part in zip(self, x.split(list(lengths), 1), strict=False)], dim=1)


class Block(HiddenLayers):
    """Pre-norm transformer block whose weights are separate for each group of tokens."""

    def __init__(self, config: TransformerConfig, groups: int) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.attention_norm = Grouped([nn.LayerNorm(width) for _ in range(groups)])
        self.query_key_value = Grouped([FusedLinear(width, width, 3) for _ in range(groups)])
        self.project = Grouped([nn.Linear(width, width) for _ in range(groups)])
        self.mlp = Grouped(
            [
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
                for _ in range(groups)
            ]
        )

    def forward(self, x: Tensor, lengths: Sequence[int], mask: Tensor | None) -> Tensor:
        """[B, L, D] → [B, L, D]; ``mask`` [L, L] or [B, 1, L, L] is True where a row may look."""
        batch, length, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x, lengths), lengths)
        query, key, value = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(mixed, lengths)
        return x + self.mlp(x, lengths)


def scale_causal(lengths: Sequence[int]) -> Tensor:
    """bool [L, L] for scales of these ``lengths``: True where a row may look, at its own and at earlier scales."""
    scale = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    return scale[:, None] >= scale[None, :]


def blind_to_chroma(planes: Sequence[str], lengths: Sequence[int]) -> Tensor:
    """bool [L, L] for scales of these planes and lengths: False where a row is luma and would look at chroma."""
    chroma = torch.tensor(
        [plane == "chroma" for plane, length in zip(planes, lengths, strict=True) for _ in range(length)]
    )
    return chroma[:, None] | ~chroma[None, :]


class Transformer(nn.Module):
    """Blocks and a last norm over a sequence of at most ``sum(group_lengths)`` tokens.

    ``mask`` bool [L, L] is True where a row may look; None: everywhere. ``std`` and ``position_std`` are the standard
    deviations of fresh weights and positions.
    """

    mask: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        group_lengths: Sequence[int],
        mask: Tensor | None = None,
        std: float = 0.02,
        position_std: float = 0.02,
    ) -> None:
        super().__init__()
        if config.width % config.heads:
            raise InputError(f"width={config.width} is no multiple of heads={config.heads}")
        self.group_lengths = tuple(group_lengths)
        self.position = nn.Parameter(torch.randn(1, sum(group_lengths), config.width) * position_std)
        self.blocks = nn.ModuleList([Block(config, len(group_lengths)) for _ in range(config.depth)])
        self.norm = Grouped([nn.LayerNorm(config.width) for _ in group_lengths])
        self.register_buffer("mask", mask, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for layers in (block.project, [mlp[-1] for mlp in block.mlp]):  # type: ignore[index]
                for layer in layers:
                    nn.init.normal_(layer.weight, std=std / (2 * config.depth) ** 0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D]; L may be a beginning. What ``present`` bool [B, L] denies nobody looks at."""
        length = x.shape[1]
        x = x + self.position[:, :length]
        lengths, rest = [], length
        for group in self.group_lengths:
            if rest:
                lengths.append(min(group, rest))
                rest -= lengths[-1]
        mask = None if self.mask is None else self.mask[:length, :length]
        if present is not None:
            seen = present[:, None, None, :]
            mask = seen if mask is None else mask & seen
        for block in self.blocks:
            x = block(x, lengths, mask)
        return self.norm(x, lengths)
