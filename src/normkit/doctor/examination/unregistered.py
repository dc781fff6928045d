"""Parameters that a model computes with and does not own: layers in a plain list.

`nn.Module` registers modules and parameters that are attributes, not those inside a
list, a tuple or a dict: `parameters()`, `state_dict()` and `to()` do not reach them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normkit.modeling.other_modules import leaves_of

__all__ = ["unregistered"]

_REGISTRIES = frozenset(["_parameters", "_buffers", "_modules"])
# A list of pairs of layers is two deep.
MAX_DEPTH = 3


def unregistered(model: nn.Module, output: Tensor) -> list[str]:
    """Return the names of unregistered parameters that the output depends on.

    A module that is kept in a list on purpose, as a teacher under `no_grad` or a
    reference to another part of the model, has none.
    """
    found = dict(_hidden(model))
    if not found:
        return []
    used = {id(leaf) for leaf in leaves_of(output)}
    return [name for name, parameter in found.items() if id(parameter) in used]


def _hidden(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    owned = {id(parameter) for parameter in model.parameters()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTRIES:
                path = f"{name}.{attribute}" if name else attribute
                yield from (
                    each for each in _inside(path, value, 0) if id(each[1]) not in owned
                )


def _inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_leaf and value.requires_grad:
            yield path, value
    elif isinstance(value, nn.Module):
        yield from value.named_parameters(path)
    elif depth < MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _inside(f"{path}.{key}", item, depth + 1)
