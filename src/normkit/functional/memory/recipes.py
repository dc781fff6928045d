"""Recipes: recompute an output from tensors that are kept anyway.

An output y = act((x − center)·scale + shift) is a function of x, which its own backward
needs anyway. An operation that saves y saves its recipe instead. Nothing is
approximated: the same kernel on the same numbers gives the same bits.

    y₁ = relu(norm(x₁) + y₀)           y₁ from x₁ and y₀; y₂ is kept, since it would
    y₂ = relu(norm(x₂) + y₁)           need y₁ first; y₃ from x₃ and y₂; …

With residuals, every second output of a chain of sums is dropped: each is recomputed
from kept tensors in one step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "held",
    "is_recomputable",
    "is_recomputable_sum",
    "keep",
    "make_recomputable",
]


def make_recomputable(
    y: Tensor, compute: Callable[[], Tensor], *, is_sum: bool = False
) -> None:
    """Register a recipe: operations that save `y` for backward save `compute` instead.

    Args:
        y: A fresh tensor.
        compute: Recomputes the values, from tensors that `keep` returned.
        is_sum: A residual is among them, see `is_recomputable_sum`.
    """
    key = y.untyped_storage().data_ptr()
    recipe = _Recipe(compute, weakref.ref(y), y._version, is_sum)
    _recipes.of[key] = recipe
    weakref.finalize(y, _forget, _recipes.of, key, recipe)


def is_recomputable(y: Tensor) -> bool:
    """Return whether there is a recipe for `y`."""
    return _recipe_of(y) is not None


def is_recomputable_sum(y: Tensor) -> bool:
    """Return whether the recipe of `y` adds a residual."""
    recipe = _recipe_of(y)
    return recipe is not None and recipe.is_sum


def keep(t: Tensor) -> Callable[[], Tensor]:
    """Return a function that recomputes `t` by its recipe, or returns it."""
    recipe = _recipe_of(t)
    if recipe is None:
        return held(t)
    return _Packed(recipe, tuple(t.shape), t.stride(), t.storage_offset()).unpack


def held(t: Tensor) -> Callable[[], Tensor]:
    """Return a function that returns `t`, or raises if it was changed in between."""
    return _Held(t, t._version).unpack


def _recipe_of(t: Tensor) -> _Recipe | None:
    if t.layout != torch.strided:
        return None
    recipe = _recipes.of.get(t.untyped_storage().data_ptr())
    # Changed in place since: the recipe would make the old values.
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
        """Return whether `saved` lies in the memory of the output, unchanged since."""
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
    """A tensor that shares the memory of a recomputable one."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def unpack(self) -> Tensor:
        y = self.recipe.again()
        return y.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Held:
    """A tensor kept as it is. Under hooks, torch does not check its version."""

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


class _Recipes(threading.local):
    def __init__(self) -> None:
        self.of: dict[int, _Recipe] = {}


_recipes = _Recipes()
