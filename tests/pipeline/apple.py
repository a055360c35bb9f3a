"""A pretended Apple GPU: numbers on the CPU that follow its rules about float64 and about tensors of two devices.

The device is called meta, the only one of PyTorch that can be pretended in Python. Which operations Apple's GPU lacks,
and how it rounds, is not known here.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = ("aten._to_copy", "aten.copy_", "aten.copy")
INDEXED = ("aten.index.", "aten.index_put")


class Apple(torch.Tensor):
    """A tensor on the pretended device; ``inner`` lies on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="meta", **place)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return carried_out(operation, args, kwargs or {})


class AppleMachine(TorchDispatchMode):
    """Inside, tensors can be made on mps, or moved there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return carried_out(operation, args, kwargs or {})


def carried_out(operation, args, kwargs):
    """Compute on the CPU, and put the result where it belongs. Raises TypeError as the real device does."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    name, target = str(operation), kwargs.get("device")
    if name.startswith(INDEXED):
        given = given[:1]  # indices may lie on the CPU
    there = [isinstance(each, Apple) for each in given]
    single = [each.ndim == 0 and not isinstance(each, Apple) for each in given]
    if not name.startswith(COPIES) and any(there) and not all(a or b for a, b in zip(there, single, strict=True)):
        raise RuntimeError(f"{name}: expected all tensors on the same device, but found mps and cpu")
    moves_there = any(there) if target is None else torch.device(target).type == "meta"
    if name.startswith("aten.copy"):
        moves_there = isinstance(args[0], Apple)
    if kwargs.get("dtype") == torch.float64 and (any(there) or moves_there):
        raise TypeError(f"{name}: the MPS framework doesn't support float64")
    if target is not None and moves_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(each.inner): each for each in given if isinstance(each, Apple)}
    plain = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Apple) else leaf, (args, kwargs))
    made = operation(*plain[0], **plain[1])

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor) or not moves_there:
            return leaf
        if leaf.dtype == torch.float64:
            raise TypeError(f"{name}: the MPS framework doesn't support float64")
        return wrappers.get(id(leaf)) if id(leaf) in wrappers else Apple(leaf)

    return tree_map(placed, made)
