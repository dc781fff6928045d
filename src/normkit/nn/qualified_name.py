"""The name of a layer in the model that holds it, for errors that it raises alone."""

from __future__ import annotations

import gc

from torch import nn

__all__ = ["qualified_name"]


def qualified_name(layer: nn.Module) -> str:
    """Return the path of `layer` from its outermost module, and its class.

    A module does not know who holds it: all modules of the process are searched, which
    takes milliseconds to tenths of a second. For errors and debugging.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
        >>> qualified_name(model[0][0])
        "'0.0' (Linear)"
        >>> qualified_name(nn.Linear(2, 3))
        'a layer outside of any model (Linear)'
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module):
            for name, child in found.__dict__.get("_modules", {}).items():
                holders.setdefault(id(child), []).append((found, name))
    parts: list[str] = []
    seen, current = {id(layer)}, layer
    # A module held twice, by a wrapper say: any path names it.
    while above := [h for h in holders.get(id(current), ()) if id(h[0]) not in seen]:
        current, name = above[0]
        seen.add(id(current))
        parts.append(name)
    kind = type(layer).__name__
    if not parts:
        return f"a layer outside of any model ({kind})"
    return f"{'.'.join(reversed(parts))!r} ({kind})"
