"""The transformer of stage 1: ADTransformer blocks with joint attention, dense or masked.

SIT (arXiv 2412.09607): tokens of approximation and details form one sequence with joint attention, but have separate
queries, keys, values, norms and MLPs in every layer. The paper does not mention the output projection of attention;
here it is separate too. With one group this is the plain transformer of ViT-VQGAN and of nested tokens.
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
    """One module per group of tokens, applied to consecutive runs of the sequence."""

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """[B, L, D] → [B, L, D']. ``lengths`` are the run lengths of the groups; a prefix may have fewer groups."""
        if len(lengths) == 1:
            return self[0](x)
        return torch.cat([module(part) for module, part in zip(self, x.split(list(lengths), 1), strict=False)], dim=1)


class Block(HiddenLayers):
    """Pre-norm transformer block with separate weights for each group of tokens."""

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
        """[B, L, D] → [B, L, D]. ``mask`` [L, L] or [B, 1, L, L] is True where a query (row) may attend."""
        batch, length, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x, lengths), lengths)
        query, key, value = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(mixed, lengths)
        return x + self.mlp(x, lengths)


def scale_causal(lengths: Sequence[int]) -> Tensor:
    """Mask bool [L, L] for scales of these ``lengths``: queries (rows) attend to their own and to earlier scales."""
    scale = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    return scale[:, None] >= scale[None, :]


def blind_to_chroma(planes: Sequence[str], lengths: Sequence[int]) -> Tensor:
    """Mask bool [L, L] for scales of these planes and lengths: False for luma queries (rows) with chroma keys."""
    chroma = torch.tensor(
        [plane == "chroma" for plane, length in zip(planes, lengths, strict=True) for _ in range(length)]
    )
    return chroma[:, None] | ~chroma[None, :]


class Transformer(nn.Module):
    """Transformer blocks and a final norm for a sequence of at most ``sum(group_lengths)`` tokens.

    ``mask`` bool [L, L] is True where a query (row) may attend; None for dense attention. ``std`` and ``position_std``
    are the standard deviations of initial weights and position embeddings. Raises ValueError if ``heads`` does not
    divide the width.
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
            raise InputError(f"width={config.width}; allowed: a multiple of heads={config.heads}")
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
        """[B, L, D] → [B, L, D]; the sequence may be a prefix. Positions where ``present`` bool [B, L] is False are
        masked."""
        length = x.shape[1]
        x = x + self.position[:, :length]
        lengths, remaining = [], length
        for group in self.group_lengths:
            if remaining:
                lengths.append(min(group, remaining))
                remaining -= lengths[-1]
        mask = None if self.mask is None else self.mask[:length, :length]
        if present is not None:
            key_mask = present[:, None, None, :]
            mask = key_mask if mask is None else mask & key_mask
        for block in self.blocks:
            x = block(x, lengths, mask)
        return self.norm(x, lengths)
