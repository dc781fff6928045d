"""A torch call, and the table of rules that lower calls to nodes.

Each family of operations registers one rule under the bare names of its operations.
A call without a rule is opaque. So is a call for whose arguments the rule returns None,
which is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold.ir.graph import Node, Slot, Value
from normkit.fold.ir.nodes import Opaque
from normkit.modeling.pytree import tensors_in

__all__ = ["Rule", "TorchCall", "is_fixed", "lower", "lowers", "values_in"]


@dataclass(frozen=True)
class TorchCall:
    """One call of a torch function, with values in place of tensors.

    Attributes:
        func: The function.
        name: Its bare name.
        label: Its name in messages.
        args: Positional arguments.
        kwargs: Named arguments.
        module: The module whose own forward made it.
        path: The name of that module.
        slots: Every place that holds a parameter, by (module, attribute).
        outputs: The values it returned.
        made: The tensors it returned.
    """

    func: Callable[..., Any]
    name: str
    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: nn.Module
    path: str
    slots: dict[tuple[nn.Module, str], Slot]
    outputs: list[Value]
    made: list[Tensor]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def value(self, position: int, name: str) -> Value | None:
        """Return an argument that is a tensor; None if it is something else."""
        found = self.get(position, name)
        return found if isinstance(found, Value) else None

    @property
    def makes_floats(self) -> bool:
        """True if its first result is floating point."""
        return self.made[0].is_floating_point()

    def empty_slot(self, name: str, beside: Value | None) -> Slot | None:
        """Return the slot `name` of the calling module, if it exists and holds None.

        A layer keeps weight and bias side by side and passes both, so a bias can be
        created where the weight beside it is the module's own.
        """
        if self.module._parameters.get(name, 0) is not None:
            return None
        own = self.slots.get((self.module, "weight"))
        if beside is not None and own not in beside.roots:
            return None
        key = (self.module, name)
        if key not in self.slots:
            self.slots[key] = Slot(f"{self.path}.{name}" if self.path else name, None)
        return self.slots[key]

    def replayed(self, moved: list[Value]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return a function that repeats the call with other tensors for `moved`."""
        func, args, kwargs = self.func, self.args, self.kwargs
        position = {value: i for i, value in enumerate(moved)}

        def replay(tensors: list[Tensor]) -> list[Tensor]:
            def filled(tree: Any) -> Any:
                if isinstance(tree, Value):
                    if tree in position:
                        return tensors[position[tree]]
                    if tree.constant is None:
                        return torch.zeros(tree.shape)  # Only its shape is read.
                    return tree.constant.cpu()
                if isinstance(tree, tuple | list):
                    parts = [filled(part) for part in tree]
                    return parts if isinstance(tree, list) else tuple(parts)
                if isinstance(tree, dict):
                    return {key: filled(part) for key, part in tree.items()}
                return tree

            return list(tensors_in(func(*filled(args), **filled(kwargs))))

        return replay


Rule = Callable[[TorchCall], Node | None]

_RULES: dict[str, Rule] = {}


def lowers(names: str) -> Callable[[Rule], Rule]:
    """Register the decorated rule for the operations in `names`."""

    def register(rule: Rule) -> Rule:
        for name in names.split():
            assert name not in _RULES, f"two rules for {name}"
            _RULES[name] = rule
        return rule

    return register


def lower(call: TorchCall, values: list[Value]) -> Node:
    """Return the node of `call`; opaque if no rule knows it.

    Args:
        call: The call.
        values: Every tensor it read, in order.
    """
    rule = _RULES.get(call.name)
    node = rule(call) if rule is not None else None
    return node or Opaque(call.label, values)


def is_fixed(weight: Any, bias: Any = None) -> bool:
    """Return True if both are the same in every run; the bias may be None."""
    return (
        isinstance(weight, Value)
        and weight.is_fixed
        and (bias is None or (isinstance(bias, Value) and bias.is_fixed))
    )


def values_in(tree: Any) -> list[Value]:
    """Return each value in nested arguments, once."""
    if isinstance(tree, Value):
        return [tree]
    found: list[Value] = []
    if isinstance(tree, tuple | list):
        found = [value for part in tree for value in values_in(part)]
    elif isinstance(tree, dict):
        found = [value for part in tree.values() for value in values_in(part)]
    return list(dict.fromkeys(found))
