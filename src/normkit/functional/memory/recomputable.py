"""Output of a layer that is recomputed from the layer's input.

`less_memory()` is a block around a forward. A layer with `memory=` has no such block:
the next layer saves its output for the backward, and runs later. So the output carries
the block along: each torch function that reads a `Recomputable` runs within it, and
returns ordinary tensors.

A reader that bypasses torch's function protocol (a full backward hook, a reentrant
checkpoint) gets the same values and gradients, and keeps the output itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from normkit.functional.memory.less_memory import less_memory

__all__ = ["Recomputable"]


class Recomputable(Tensor):
    """View of a tensor for which there is a recipe, see `recipes`."""

    plain: Tensor
    """The tensor itself."""

    @staticmethod
    def of(y: Tensor) -> Recomputable:
        """Return `y` as a tensor whose readers keep its recipe."""
        wrapped: Any = y.as_subclass(Recomputable)
        wrapped.plain = y
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function on the plain tensor, within the block."""
        args, kwargs = tree_map_only(Recomputable, _plain, (args, kwargs or {}))
        with less_memory():
            return func(*args, **kwargs)


def _plain(y: Recomputable) -> Tensor:
    return y.plain
