"""Tensors inside containers: what models take and return.

Unlike `torch.utils._pytree`, which knows registered containers only, these functions
also look into plain objects, dataclasses and any mapping.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_tensors", "tensors_in"]


def tensors_in(tree: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield each tensor in `tree`, in a fixed order.

    Example:
        >>> tree = {"x": torch.ones(1), "more": [torch.zeros(2), (3, "four")]}
        >>> [tuple(t.shape) for t in tensors_in(tree)]
        [(1,), (2,)]
    """
    seen = set() if _seen is None else _seen
    if isinstance(tree, Tensor):
        yield tree
        return
    if isinstance(tree, _LEAVES) or id(tree) in seen:
        return
    seen.add(id(tree))
    for part in _parts(tree):
        yield from tensors_in(part, seen)


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a copy of `tree` with `change` applied to each tensor.

    Everything that is no tensor and holds none is shared with the original.

    Example:
        >>> map_tensors({"x": [torch.ones(2)]}, lambda t: 2 * t)
        {'x': [tensor([2., 2.])]}
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, _LEAVES):
        return tree
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(part, change) for part in tree))
    if isinstance(tree, list | tuple | set):
        return type(tree)(map_tensors(part, change) for part in tree)
    if isinstance(tree, dict):
        new = copy.copy(tree)
        for key, part in tree.items():
            new[key] = map_tensors(part, change)
        return new
    if dataclasses.is_dataclass(tree) or (
        hasattr(tree, "__dict__") and any(True for _ in tensors_in(tree))
    ):
        new = copy.copy(tree)
        for key, part in vars(tree).items():
            object.__setattr__(new, key, map_tensors(part, change))
        return new
    return tree


_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    torch.dtype,
    torch.device,
    torch.nn.Module,
)


def _parts(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, list | tuple | set | frozenset):
        return list(tree)
    if callable(tree):
        return []
    return list(getattr(tree, "__dict__", {}).values())
