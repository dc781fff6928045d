"""Hooks that stop with the probe that registered them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Hook"]


class Hook:
    """A hook that does nothing after it is copied or pickled with its model."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the wrapped function and drop its result."""
        # A compiler would trace the hook into the model, and compile another model.
        if not torch.compiler.is_compiling():
            self._call(*args, **kwargs)

    def retire(self) -> None:
        """Do nothing from now on: torch calls the hooks that a call started with."""
        self._call = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a hook in a copy of the model."""
