"""The ranks that a layer takes its statistics over, by its `process_group`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from normkit.nn.qualified_name import qualified_name
from normkit.sync.groups import Ranks, is_alone, is_group, process_group_of
from normkit.torch_state import is_compiling

__all__ = ["is_over_ranks", "ranks_of", "with_group_name"]

# The process_group of a layer, the default group at that time, and what they mean. Not
# on the layers: a copy, a pickle or another class would have to leave it behind. The
# default group is not held: `Ranks` says why.
_known: WeakKeyDictionary[nn.Module, tuple[Any, weakref.ref[Any], Ranks]] = (
    WeakKeyDictionary()
)


def with_group_name(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a layer's state with its process group as a name, for pickle."""
    state = dict(state)
    group = state.get("process_group")
    if group is not None and hasattr(group, "group_name"):
        state["process_group"] = group.group_name
    return state


def is_over_ranks(layer: nn.Module) -> bool:
    """Return whether `layer.process_group` has other ranks, as `is_group` does."""
    if is_alone() or is_compiling():
        return is_group(layer.process_group)
    return ranks_of(layer).size > 1


def ranks_of(layer: nn.Module) -> Any:
    """Return the ranks of `layer.process_group`, with the layer's name for errors.

    A plain process group under a compiler, which calls nothing for a name.

    Raises:
        ArgumentError: It names no group, or one that this rank is not in.
    """
    asked_for = layer.process_group
    if is_compiling():
        return process_group_of(asked_for)
    known, world = _known.get(layer), dist.group.WORLD
    # Looked up once: which group a mesh means, and whether this rank is in it.
    if known is None or known[0] is not asked_for or known[1]() is not world:
        group = process_group_of(asked_for)
        if known is None or not known[2].is_of(group):
            ranks = Ranks(group, _name_of(layer))
        else:
            ranks = known[2]
        known = _known[layer] = asked_for, weakref.ref(world), ranks
    return known[2]


def _name_of(layer: nn.Module) -> Callable[[], str]:
    itself = weakref.ref(layer)

    def name() -> str:
        found = itself()
        if found is None:
            return "a layer that is gone"
        channels = getattr(found, "num_features", None)
        told = qualified_name(found)
        return told if channels is None else f"{told[:-1]}, {channels} channels)"

    return name
