"""Layers of the priors: self-attention with a cache, cross-attention to a memory, blocks and stacks of blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.attention import Spans, attend
from stages.layers import FusedLinear, HiddenLayers


def cache_dtype(weight: Tensor) -> torch.dtype:
    """dtype of the keys and values of a layer with this weight, with or without autocast."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class Attention(nn.Module):
    """Self-attention, causal or not, with an optional preallocated key-value cache."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query_key_value = FusedLinear(width, width, 3, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | Spans | None = None, cache: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; ``mask`` bool [L, T] or spans replace the causal mask.

        With ``cache`` [2, B, H, T, D/H], keys and values are written to its ``slots`` [L], and ``mask`` [L, T] selects
        the cached slots to attend to.
        """
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None and slots is not None:
            cache[0].index_copy_(2, slots, key.to(cache.dtype))
            cache[1].index_copy_(2, slots, value.to(cache.dtype))
            key, value = cache[0].to(query.dtype), cache[1].to(query.dtype)
        mixed = attend(query, key, value, mask, causal=mask is None and self.causal)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Attention of the sequence to a fixed memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = FusedLinear(width, width, 2, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values [2, B, H, M, D/H] of a memory [B, M, D]."""
        batch, length, width = memory.shape
        return self.key_value(memory).view(batch, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, remembered: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D] → [B, L, D]; ``mask`` bool [B, 1, 1, M] selects the memory states to attend to; None: all."""
        batch, length, width = x.shape
        query = self.query(self.norm(x)).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        key, value = remembered.to(query.dtype)
        return self.project(attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """Gated feed-forward layer without biases (arXiv 2002.05202, section 2).

    Parameters and their initialization are those of ``timm.layers.SwiGLU``. Importing timm takes longer than importing
    torch, and a prior needs nothing else from it.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden, bias=False)
        self.fc1_x = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]"""
        return self.fc2(functional.silu(self.fc1_g(x)) * self.fc1_x(x))


class Block(HiddenLayers):
    """Pre-norm block: self-attention, optional cross-attention to a memory, and SwiGLU.

    ``gated`` branches are scaled by learned factors that start at zero (ReZero, arXiv 2003.04887), so a new block is
    the identity.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden_ratio: float,
        dropout: float,
        cross: bool = False,
        causal: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(3)) if gated else None
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, causal)
        self.cross = CrossAttention(width, heads) if cross else None
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, round(width * hidden_ratio / 8) * 8)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Spans | None = None,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
        remembered: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]; arguments as in ``Attention`` and ``CrossAttention``."""
        x = x + self._branch(0, self.attention(self.attention_norm(x), mask, cache, slots))
        if self.cross is not None:
            x = x + self._branch(1, self.cross(x, remembered, memory_mask))
        return x + self._branch(2, self.mlp(self.mlp_norm(x)))

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values [2, B, H, M, D/H] of a memory [B, M, D]; requires cross-attention."""
        assert self.cross is not None
        return self.cross.remember(memory)

    def _branch(self, number: int, x: Tensor) -> Tensor:
        return self.dropout(x) if self.gates is None else self.gates[number].to(x.dtype) * self.dropout(x)


class Decoder(nn.Module):
    """Causal layers with cross-attention to the encoder, and a head for the logits of one field."""

    def __init__(self, depth: int, sizes: tuple[int, int, float, float], vocabulary: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(*sizes, cross=True, gated=True) for _ in range(depth)])
        self.norm = nn.RMSNorm(sizes[0])
        self.head = nn.Linear(sizes[0], vocabulary, bias=False)

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values of all layers [depth, 2, B, H, M, D/H] of a memory [B, M, D]."""
        return torch.stack([block.remember(memory) for block in self.blocks])  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        remembered: Tensor,
        memory_mask: Tensor | None,
        cache: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, n, D] of inputs [B, n, D], which go to ``slots`` of the cache [depth, 2, B, H, T, D/H]."""
        mask = None
        if cache is not None and slots is not None:
            mask = torch.arange(cache.shape[4], device=x.device) <= slots[:, None]
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[index]
            x = block(x, mask, layer_cache, slots, remembered[index], memory_mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., D]."""
        return self.head(self.norm(hidden)).float()
