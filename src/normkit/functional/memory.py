"""What is kept between forward and backward, and keeping less of it.

    with less_memory():                conv → batch norm + relu → conv → …
        loss = model(x).sum()          keeps one activation per layer instead of two:
    loss.backward()                    the next layer's input is computed again from x

An output y = act((x − center)·scale + shift) is a function of x, which its own backward
needs anyway. Whoever saves y within the block saves how to compute it instead. Nothing
is approximated: the same kernel on the same numbers gives the same bits.

    y₁ = relu(norm(x₁) + y₀)           y₁ from x₁ and y₀; y₂ is kept, since it would
    y₂ = relu(norm(x₂) + y₁)           need y₁ again first; y₃ from x₃ and y₂; …

With a residual every second output of a chain of sums goes: each is computed from what
is kept, in one step.

`"int8"` also keeps x itself as one byte per value where y cannot stand for it (a
residual is added, or nothing follows): gradients are then off by the rounding.

`saved_memory` counts what a forward keeps, whoever keeps it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from normkit.errors import ArgumentError

__all__ = [
    "Mode",
    "SavedMemory",
    "is_remembered",
    "is_remembered_sum",
    "keep",
    "less_memory",
    "memory_mode",
    "remember",
    "saved_memory",
]

Mode = Literal["recompute", "int8"]


class less_memory:  # noqa: N801  a context manager, named as the verb it is
    """Keep less for the backward of everything that runs in the block.

    Args:
        mode: `"recompute"`: exact, about 4 bytes of extra traffic per value.
            `"int8"`: also rounds the inputs of normalizations with a residual, or with
            no activation, to a byte; gradients are approximate, and second derivatives
            through such a layer raise.

    Raises:
        ArgumentError: `mode` is neither of the two.

    Example:
        >>> import torch
        >>> import normkit
        >>> conv = torch.nn.Conv1d(3, 3, 1)
        >>> x = torch.randn(2, 3, 5)
        >>> with saved_memory() as plain:
        ...     y = conv(normkit.functional.instance_norm(conv(x)))
        >>> with less_memory(), saved_memory() as less:
        ...     y = conv(normkit.functional.instance_norm(conv(x)))
        >>> plain.bytes - less.bytes == x.numel() * 4
        True
    """

    def __init__(self, mode: Mode = "recompute") -> None:
        if mode not in ("recompute", "int8"):
            raise ArgumentError(f"mode={mode!r} must be 'recompute' or 'int8'")
        self._mode: Mode = mode
        self._entered: list[_Watch] = []

    def __enter__(self) -> less_memory:
        watch = _Watch(self._mode)
        watch.__enter__()
        self._entered.append(watch)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    @classmethod
    def during(
        cls, model: torch.nn.Module, mode: Mode = "recompute"
    ) -> list[RemovableHandle]:
        """Enter the block in every forward of `model`; remove the handles to undo."""
        block = cls(mode)

        def before(module: torch.nn.Module, args: Any) -> None:
            block.__enter__()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            block.__exit__(None, None, None)

        return [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]


@dataclass
class SavedMemory:
    """Bytes that a forward keeps for its backward, parameters left out.

    Attributes:
        by_module: Bytes for each module that saved something first, by its name; a
            tensor that several save counts once.
    """

    by_module: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.by_module.values())

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"bytes": self.bytes, "by_module": dict(self.by_module)}

    def to_text(self) -> str:
        """One line per module, most bytes first."""
        order = sorted(self.by_module.items(), key=lambda item: -item[1])
        lines = [f"{count / 1e6:10.3f} MB  {name or '-'}" for name, count in order]
        return "\n".join(
            [f"{self.bytes / 1e6:10.3f} MB  kept for the backward", *lines]
        )


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
        self._watch = _Watch(None, self._count)
        self._seen: dict[int, Any] = {}

    def __enter__(self) -> SavedMemory:
        self._running.start()
        self._watch.__enter__()
        return self._saved

    def __exit__(self, *exception: Any) -> None:
        self._watch.__exit__(*exception)
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

    Torch's own tracker asks outputs whether they need a gradient; a batch norm's that
    waits for what follows would be computed by that, and less would be fused.
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


def memory_mode() -> Mode | None:
    """The mode of the innermost `less_memory` block of this thread."""
    if not _state.watches:
        return None
    for watch in reversed(_state.watches):
        if watch.mode is not None:
            return watch.mode
    return None


def remember(y: Tensor, compute: Callable[[], Tensor], *, is_sum: bool = False) -> None:
    """Let whoever saves `y` in this block save `compute` instead.

    Args:
        y: A fresh tensor.
        compute: Gives the same values again; what it needs it has from `keep`.
        is_sum: Whether a residual is among that, see `is_remembered_sum`.
    """
    key = y.untyped_storage().data_ptr()
    recipe = _Recipe(compute, weakref.ref(y), y._version, is_sum)
    _state.recipes[key] = recipe
    weakref.finalize(y, _forget, _state.recipes, key, recipe)


def is_remembered(y: Tensor) -> bool:
    """Whether there is a recipe that makes `y` again."""
    return _recipe_of(y) is not None


def is_remembered_sum(y: Tensor) -> bool:
    """Whether that recipe adds a residual: another sum on top would need both again."""
    recipe = _recipe_of(y)
    return recipe is not None and recipe.is_sum


def keep(t: Tensor) -> Callable[[], Tensor]:
    """How to have `t` again: what was remembered of it, else `t` itself, unchanged."""
    recipe = _recipe_of(t)
    if recipe is None:
        return _Held(t, t._version).unpack
    return _Packed(recipe, tuple(t.shape), t.stride(), t.storage_offset()).unpack


def _recipe_of(t: Tensor) -> _Recipe | None:
    if t.layout != torch.strided:
        return None
    recipe = _state.recipes.get(t.untyped_storage().data_ptr())
    # Changed in place since: the recipe makes what it was before.
    return recipe if recipe is not None and recipe.makes(t) else None


def _forget(recipes: dict[int, _Recipe], key: int, recipe: _Recipe) -> None:
    if recipes.get(key) is recipe:
        del recipes[key]


@dataclass(eq=False)
class _Recipe:
    compute: Callable[[], Tensor]
    made: Callable[[], Tensor | None]
    version: int
    is_sum: bool
    # Two consumers that unpack at the same time share one copy.
    latest: Callable[[], Tensor | None] = lambda: None

    def makes(self, saved: Tensor) -> bool:
        """Whether `saved` lies in the memory of the output, unchanged since."""
        y = self.made()
        return (
            y is not None
            and y.untyped_storage().data_ptr() == saved.untyped_storage().data_ptr()
            and saved._version == y._version == self.version
            and saved.dtype == y.dtype
        )

    def again(self) -> Tensor:
        y = self.latest()
        if y is None:
            y = self.compute()
            self.latest = weakref.ref(y)
        return y


@dataclass(frozen=True)
class _Packed:
    """A tensor that shares the memory of a remembered one."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def unpack(self) -> Tensor:
        y = self.recipe.again()
        return y.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Held:
    """A tensor kept as it is. Under hooks, torch leaves its version to them."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been "
                f"modified by an inplace operation: a {self.tensor.dtype} tensor of "
                f"shape {tuple(self.tensor.shape)} was saved at version "
                f"{self.version} and is at version {self.tensor._version} now; "
                "leave it as it is until the backward, or change a copy"
            )
        return self.tensor


class _Watch:
    """Hooks on saved tensors; nested watches all see what is saved."""

    def __init__(
        self, mode: Mode | None, count: Callable[[Tensor], None] | None = None
    ) -> None:
        self.mode: Mode | None = mode
        self.count = count
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        _state.watches.append(self)
        self._hooks = saved_tensors_hooks(_pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*exception)
        _state.watches.remove(self)


class _State(threading.local):
    def __init__(self) -> None:
        self.watches: list[_Watch] = []
        self.recipes: dict[int, _Recipe] = {}


_state = _State()


def _pack(saved: Tensor) -> Callable[[], Tensor]:
    if memory_mode() is not None and _recipe_of(saved) is not None:
        return keep(saved)
    for watch in _state.watches:
        if watch.count is not None:
            watch.count(saved)
    return _Held(saved, saved._version).unpack


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()
