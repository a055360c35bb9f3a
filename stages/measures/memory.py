"""Exact memory that a training step keeps for its backward pass: the bytes of all saved tensors."""

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
    """Bytes that ``step``, a training pass of ``network``, saves for its backward pass: per part and for the ``rest``.

    A tensor counts once, for the part that saves it first; weights do not count. Tensors passed to modules of a part
    after their first argument count for the part that ``givers`` names.
    """
    current = ["rest"]
    bytes_by_part = dict.fromkeys([*parts, "rest"], 0)
    seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    giver_of: dict[int, str] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for argument in arguments[1:] if name in givers else ():
                if isinstance(argument, Tensor):
                    giver_of[argument.untyped_storage().data_ptr()] = givers[name]
            current.append(name)

        return hook

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        current.pop()

    kept: list[Tensor] = []  # keep references, so that no storage address is reused

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            kept.append(tensor)
            bytes_by_part[giver_of.get(address, current[-1])] += tensor.untyped_storage().nbytes()
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
    return bytes_by_part
