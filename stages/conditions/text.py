"""Captions as a condition, alone or with a class.

- Caption states come from a frozen text encoder through the token cache; only their projection is learned. Word ids
  have a learned embedding instead.
- The prior reads them as a prefix before its tokens, or by cross-attention. In both cases a learned state comes first,
  so that there is always a state to attend to. Padding after a caption is a learned state (prefix) or masked
  (cross-attention), so the result for a sample does not depend on the longest caption in its batch.
- No text means the empty caption, whose states are stored with the weights. So guidance needs no text encoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import InputError
from stages.conditions.config import ClassTextConditionConfig, TextConditionConfig
from stages.conditions.labels import ClassCondition
from stages.contract import Condition, ConditionStates, Prompts


class TextCondition(Condition):
    """Condition on a caption. ``text`` is the spec of the text encoder of the token cache.

    Raises ValueError without a text encoder, or for an unknown ``attend``.
    """

    uses_labels = False
    uses_text = True
    empty: Tensor

    def __init__(
        self, config: TextConditionConfig, class_names: list[str], width: int, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if text is None:
            raise InputError(
                f"condition.kind={config.kind}, but the token cache has no caption states; set tokens.text_encoder "
                "(words, minilm, ...) and run cache-tokens again, or use condition.kind=class or none"
            )
        if config.attend not in ("prefix", "cross"):
            raise InputError(f"condition.attend={config.attend!r}; allowed: prefix, cross")
        self.dropout = config.dropout
        self.cross = config.attend == "cross"
        self.max_tokens = int(text["max_tokens"])
        self.num_states = 1 if self.cross else 1 + self.max_tokens
        self.encoder, self.text_width = text["encoder"], int(text["width"])
        self.project: nn.Module
        if self.text_width:
            self.project = nn.Sequential(nn.LayerNorm(self.text_width), nn.Linear(self.text_width, width))
            self.register_buffer("empty", torch.zeros(int(text["empty_length"]), self.text_width))
        else:
            self.project = nn.Embedding(1 + len(text["vocabulary"]), width)  # id 0 is an unknown word
            self.register_buffer("empty", torch.zeros(int(text["empty_length"]), 1, dtype=torch.int64))
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.padding = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, self.max_tokens, width) * 0.02)

    def set_empty(self, states: np.ndarray) -> None:
        """Store the states [t, W] of the empty caption from the cache. Raises ValueError for another shape."""
        tensor = torch.from_numpy(np.array(states)).to(self.empty.dtype)
        if tensor.shape != self.empty.shape:
            raise InputError(
                f"the empty caption has states of shape {tuple(tensor.shape)}; expected from the text encoder: "
                f"{tuple(self.empty.shape)}"
            )
        self.empty.copy_(tensor)

    def first(self, prompts: Prompts) -> Tensor:
        """The first state [B, 1, width], which is always present."""
        return self.start.expand(len(prompts), 1, -1)

    def forward(self, prompts: Prompts) -> ConditionStates:
        text, lengths = self._filled(prompts)
        valid = torch.arange(self.max_tokens, device=lengths.device) < lengths[:, None]
        states = self.project(text if self.text_width else text[..., 0]) + self.position
        first = self.first(prompts)
        if not self.cross:
            return ConditionStates(torch.cat([first, torch.where(valid.unsqueeze(-1), states, self.padding)], dim=1))
        mask = torch.cat([valid.new_ones(len(prompts), 1), valid], dim=1)
        return ConditionStates(first, torch.cat([self.padding.expand_as(first), states], dim=1), mask)

    def _filled(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """(text [B, max_tokens, W], lengths [B]), with the empty caption for samples without text."""
        text, lengths = prompts.text, prompts.text_lengths
        if text.shape[1] > self.max_tokens or (text.shape[1] and text.shape[2] != self.empty.shape[1]):
            raise InputError(
                f"captions of up to {text.shape[1]} states of width {text.shape[2]} given to a prior that was trained "
                f"with {self.encoder}: {self.max_tokens} states of width {self.empty.shape[1]}"
            )
        padded_text = self.empty.new_zeros(len(prompts), self.max_tokens, self.empty.shape[1])
        padded_text[:, : text.shape[1]] = text.to(padded_text.dtype)
        padded_empty = self.empty.new_zeros(self.max_tokens, self.empty.shape[1])
        padded_empty[: len(self.empty)] = self.empty
        no_text = lengths == 0
        padded_text = torch.where(no_text[:, None, None], padded_empty, padded_text)
        return padded_text, torch.where(no_text, len(self.empty), lengths)


class ClassTextCondition(TextCondition):
    """Condition on a class and a caption. The class embedding is added to the first state."""

    uses_labels = True

    def __init__(
        self, config: ClassTextConditionConfig, class_names: list[str], width: int, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__(config, class_names, width, text)
        self.labels = ClassCondition(config, class_names, width)

    def first(self, prompts: Prompts) -> Tensor:
        return super().first(prompts) + self.labels.states(prompts.labels)

    def drop(self, prompts: Prompts) -> Prompts:
        both, label, text = (torch.rand(3, len(prompts), device=prompts.labels.device) < self.dropout).unbind()
        return prompts.without(both | label, both | text)
