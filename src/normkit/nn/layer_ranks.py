"""The ranks that a layer takes its statistics over, by its `process_group`."""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from normkit.nn.qualified_name import qualified_name
from normkit.sync.groups import Ranks, process_group_of
from normkit.torch_state import is_compiling

__all__ = ["ranks_of", "with_group_name"]

# Not on the layers: a copy, a pickle or another class would have to leave it behind.
_known: WeakKeyDictionary[nn.Module, Ranks] = WeakKeyDictionary()


def with_group_name(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a layer's state with its process group as a name, for pickle."""
    state = dict(state)
    group = state.get("process_group")
    if group is not None and hasattr(group, "group_name"):
        state["process_group"] = group.group_name
    return state


def ranks_of(layer: nn.Module) -> Any:
    """Return the ranks of `layer.process_group`, with the layer's name for errors.

    A plain process group under a compiler, which calls nothing for a name.

    Raises:
        ArgumentError: It names no group, or one that this rank is not in.
    """
    group = process_group_of(layer.process_group)
    if is_compiling():
        return group
    known = _known.get(layer)
    if known is None or known.group is not group:
        itself = weakref.ref(layer)

        def name() -> str:
            found = itself()
            if found is None:
                return "a layer that is gone"
            channels = getattr(found, "num_features", None)
            told = qualified_name(found)
            return told if channels is None else f"{told[:-1]}, {channels} channels)"

        known = _known[layer] = Ranks(group, name)
    return known
