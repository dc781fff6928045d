"""The tensors inside a nest of containers: what models take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_tensors", "tensors_in"]


def tensors_in(nest: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Each tensor in `nest`, in a fixed order: containers, then plain objects.

    Example:
        >>> nest = {"x": torch.ones(1), "more": [torch.zeros(2), (3, "four")]}
        >>> [tuple(t.shape) for t in tensors_in(nest)]
        [(1,), (2,)]
    """
    seen = set() if _seen is None else _seen
    if isinstance(nest, Tensor):
        yield nest
        return
    if isinstance(nest, _LEAVES) or id(nest) in seen:
        return
    seen.add(id(nest))
    for part in _parts(nest):
        yield from tensors_in(part, seen)


def map_tensors(nest: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of `nest` with `change` applied to each tensor; other leaves are shared.

    Example:
        >>> map_tensors({"x": [torch.ones(2)]}, lambda t: 2 * t)
        {'x': [tensor([2., 2.])]}
    """
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, _LEAVES):
        return nest
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_tensors(part, change) for part in nest))
    if isinstance(nest, list | tuple | set):
        return type(nest)(map_tensors(part, change) for part in nest)
    if isinstance(nest, dict):
        new = copy.copy(nest)
        for key, part in nest.items():
            new[key] = map_tensors(part, change)
        return new
    if dataclasses.is_dataclass(nest) or (
        hasattr(nest, "__dict__") and any(True for _ in tensors_in(nest))
    ):
        new = copy.copy(nest)
        for key, part in vars(nest).items():
            object.__setattr__(new, key, map_tensors(part, change))
        return new
    return nest


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


def _parts(nest: Any) -> list[Any]:
    if isinstance(nest, Mapping):
        return list(nest.values())
    if isinstance(nest, list | tuple | set | frozenset):
        return list(nest)
    if callable(nest):
        return []
    return list(getattr(nest, "__dict__", {}).values())
