"""Hooks on saved tensors: keep less in a forward, or count what is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from normkit.functional.memory.recipes import held, is_recomputable, keep

__all__ = ["Block", "Mode", "memory_mode"]

Mode = Literal["recompute", "int8"]


def memory_mode() -> Mode | None:
    """Return the mode of the innermost `less_memory` block of this thread."""
    if not _blocks.open:
        return None
    for block in reversed(_blocks.open):
        if block.mode is not None:
            return block.mode
    return None


class Block:
    """Hooks on saved tensors; nested blocks all see what is saved.

    Args:
        mode: Mode of `less_memory`, or None.
        count: Called with each tensor that is kept.
        owner: The object that opened the block, see `close`.
    """

    def __init__(
        self,
        mode: Mode | None,
        count: Callable[[Tensor], None] | None = None,
        owner: object = None,
    ) -> None:
        self.mode: Mode | None = mode
        self.count = count
        self.owner = owner
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        _blocks.open.append(self)
        self._hooks = saved_tensors_hooks(_pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*exception)
        _blocks.open.remove(self)

    @staticmethod
    def close(owner: object) -> None:
        """Leave the innermost block of this thread that `owner` opened."""
        block = next(b for b in reversed(_blocks.open) if b.owner is owner)
        block.__exit__(None, None, None)


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.open: list[Block] = []


_blocks = _Blocks()


def _pack(saved: Tensor) -> Callable[[], Tensor]:
    if memory_mode() is not None and is_recomputable(saved):
        return keep(saved)
    for block in _blocks.open:
        if block.count is not None:
            block.count(saved)
    return held(saved)


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()
