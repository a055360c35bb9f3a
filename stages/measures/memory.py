"""What a training step keeps for its backward pass, counted and not sampled: the bytes of all saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(
    step: Callable[[], object],
    network: nn.Module,
    parts: Mapping[str, list[nn.Module]] = {},
    givers: Mapping[str, str] = {},
) -> dict[str, int]:
    """Bytes that ``step``, a training pass of ``network``, saves for its backward pass, in each part and in all else
    (``rest``).

    A tensor counts once, where it is saved first; weights do not count. What modules of a part are given after their
    first argument counts for the part that ``givers`` names.
    """
    current = ["rest"]
    found = dict.fromkeys([*parts, "rest"], 0)
    seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
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
    was_training = network.training
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.train()
            step()
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
