"""Count the bytes that a forward keeps for its backward."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from normkit.functional.memory.block import Block
from normkit.results import Result

__all__ = ["SavedMemory", "saved_memory"]


@dataclass(repr=False)
class SavedMemory(Result):
    """Bytes that a forward keeps for its backward, parameters left out.

    Attributes:
        by_module: Bytes by name of module; a tensor that several modules save counts
            for the first one.
    """

    by_module: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def bytes(self) -> int:
        """Bytes of all modules."""
        return sum(self.by_module.values())

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {"bytes": self.bytes, "by_module": dict(self.by_module)}

    def to_text(self) -> str:
        """Return one line per module, most bytes first."""
        order = sorted(self.by_module.items(), key=lambda item: -item[1])
        lines = [f"{count / 1e6:10.3f} MB  {name or '-'}" for name, count in order]
        return "\n".join(
            [f"{self.bytes / 1e6:10.3f} MB  kept for the backward", *lines]
        )

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per module, most bytes first."""
        order = sorted(self.by_module.items(), key=lambda item: -item[1])
        return [{"module": name, "bytes": count} for name, count in order]


class saved_memory:  # noqa: N801
    """Count the bytes that everything in the block keeps for the backward.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 3)
        >>> with saved_memory() as saved:
        ...     y = layer(torch.ones(5, 3, requires_grad=True)).relu()
        >>> saved.bytes  # the input and the output of relu
        120
    """

    def __init__(self) -> None:
        self._saved = SavedMemory()
        self._running = _Running()
        self._block = Block(None, self._count)
        self._seen: dict[int, Any] = {}

    def __enter__(self) -> SavedMemory:
        self._running.start()
        self._block.__enter__()
        return self._saved

    def __exit__(self, *exception: Any) -> None:
        self._block.__exit__(*exception)
        self._running.stop()
        self._seen.clear()

    def _count(self, saved: Tensor) -> None:
        base = saved if saved._base is None else saved._base
        if isinstance(base, torch.nn.Parameter):
            return
        storage = saved.untyped_storage()
        if storage.data_ptr() in self._seen:
            return
        # Held until the block ends, so that no other tensor gets the same address.
        self._seen[storage.data_ptr()] = storage
        name = self._running.name
        counts = self._saved.by_module
        counts[name] = counts.get(name, 0) + storage.nbytes()


class _Running:
    """The name of the module that runs, as `"Net.layer.0"`.

    torch's own tracker reads `requires_grad` of outputs, which would compute a deferred
    output of batch norm and prevent its fusion.
    """

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str]
        self._names = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def name(self) -> str:
        return self._stack[-1] if self._stack else ""

    def start(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._begins),
            register_module_forward_hook(self._ends, always_call=True),
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._names.clear()
        self._stack.clear()

    def _begins(self, module: torch.nn.Module, args: Any) -> None:
        name = self._names.setdefault(module, type(module).__name__)
        for key, child in module.named_children():
            self._names.setdefault(child, f"{name}.{key}")
        self._stack.append(name)

    def _ends(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
