"""Class labels as a condition, and no condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from stages.conditions.config import ClassConditionConfig as ClassConditionConfig
from stages.conditions.config import ConditionConfig, NoConditionConfig
from stages.contract import Condition, ConditionStates, Prompts


class ClassCondition(Condition):
    """One learned state per class, and one for no class. Raises ValueError without classes."""

    num_states = 1
    uses_labels = True

    def __init__(
        self, config: ConditionConfig, class_names: list[str], width: int, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not class_names:
            raise InputError(
                f"condition.kind={config.kind}, but the cache has no class names; use another condition.kind"
            )
        self.num_classes = len(class_names)
        self.dropout = config.dropout
        self.table = nn.Embedding(self.num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, prompts: Prompts) -> ConditionStates:
        return ConditionStates(self.states(prompts.labels))

    def states(self, labels: Tensor) -> Tensor:
        """States [B, 1, width] of class ids int64 [B]; -1 for no class. Raises ValueError for ids out of range."""
        if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            wrong = int(labels.max()) if int(labels.max()) >= self.num_classes else int(labels.min())
            raise InputError(f"class id {wrong}; allowed: 0 to {self.num_classes - 1}, or -1 for none")
        return self.table(torch.where(labels < 0, self.num_classes, labels)).unsqueeze(1)


class NoCondition(Condition):
    """One learned start state, independent of the label."""

    num_states = 1
    uses_labels = False

    def __init__(
        self, config: NoConditionConfig, class_names: list[str], width: int, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)

    def forward(self, prompts: Prompts) -> ConditionStates:
        return ConditionStates(self.start.expand(len(prompts), 1, -1))
