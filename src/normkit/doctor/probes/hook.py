"""Hooks that stop with the probe that registered them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from normkit.torch_state import has_transforms, is_compiling, is_jit_tracing

__all__ = ["Hook"]


class Hook:
    """A hook that does nothing after it is copied or pickled with its model.

    Args:
        call: What the hook calls.
        in_transforms: Call it inside transforms of torch.func, too. Whatever a hook
            computes there, also from plain tensors, has no values to read afterwards.
    """

    def __init__(
        self, call: Callable[..., None], *, in_transforms: bool = False
    ) -> None:
        self._call = call
        self._in_transforms = in_transforms

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the wrapped function and drop its result."""
        # A compiler would trace the hook into the model, and compile another model.
        if is_compiling() or is_jit_tracing():
            return
        if self._in_transforms or not has_transforms():
            self._call(*args, **kwargs)

    def retire(self) -> None:
        """Do nothing from now on: torch calls the hooks that a call started with."""
        self._call = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        # A method that takes any positional arguments and returns None: a file with
        # the model can be read where normkit is not installed.
        return getattr, (nullcontext(), "__exit__")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a hook that has retired."""
