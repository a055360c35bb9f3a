"""What a training step keeps for its backward pass, counted and not sampled: the bytes of all saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.layout import Tokens
from stages.contract import Prior, Prompts


def bytes_saved_by(step: Callable[[], Tensor], network: nn.Module) -> tuple[int, Tensor]:
    """(bytes that ``step`` saves for its backward pass, what it returned). A tensor counts once, weights do not."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = step()
    return total, made


def saved_bytes(
    prior: Prior, tokens: Tokens, prompts: Prompts, parts: dict[str, list[nn.Module]], givers: dict[str, str]
) -> dict[str, int]:
    """Bytes that one training pass saves for its backward pass, in each part and in all else (``rest``).

    A tensor counts once, where it is saved first; weights do not count. What modules of a part are given after their
    first argument counts for the part that ``givers`` names.
    """
    current = ["rest"]
    found = dict.fromkeys([*parts, "rest"], 0)
    seen = {parameter.untyped_storage().data_ptr() for parameter in prior.parameters()}
    given: dict[int, str] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for argument in arguments[1:] if name in givers else ():
                if isinstance(argument, Tensor):
                    given[argument.untyped_storage().data_ptr()] = givers[name]
            current.append(name)

        return hook

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        current.pop()

    kept: list[Tensor] = []  # so that no storage is used twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            kept.append(tensor)
            found[given.get(place, current[-1])] += tensor.untyped_storage().nbytes()
        return tensor

    hooks = []
    for name, modules in parts.items():
        for module in modules:
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after)]
    was_training = prior.training
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prior.train()(tokens, prompts)
    finally:
        prior.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
