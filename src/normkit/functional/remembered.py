"""One layer's output, which whoever reads it does not keep.

`less_memory()` is a block around a forward. A single layer has no such block: who saves
its output for the backward is the next layer, which runs later. So the output carries
the block along: each torch function that reads a `Remembered` runs within it, and
returns ordinary tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from normkit.functional.memory import less_memory

__all__ = ["Remembered"]


class Remembered(Tensor):
    """A tensor that shares the memory of a remembered one, see `memory.remember`."""

    plain: Tensor
    """The tensor itself, of the same memory, with its graph."""

    @staticmethod
    def of(y: Tensor) -> Remembered:
        """`y` for readers that shall keep its recipe instead of it."""
        with torch.no_grad():
            wrapped: Any = y.detach().as_subclass(Remembered)
        wrapped.plain = y
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function on the plain tensor, within the block."""
        args, kwargs = tree_map_only(Remembered, _plain, (args, kwargs or {}))
        with less_memory():
            return func(*args, **kwargs)


def _plain(y: Remembered) -> Tensor:
    return y.plain
