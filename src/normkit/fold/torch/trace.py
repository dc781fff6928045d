"""One forward of a torch model, traced: which module call ran which node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normkit.fold.ir.graph import Graph, Node, Slot, Value

__all__ = ["ModuleCall", "TorchFunction", "Trace", "identities"]


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Attributes:
        module: The module.
        path: Its first name in the model, "" for the model itself.
        parent: The call within which it happened.
        inputs: The tensors that it was called with.
        outputs: The tensors that it returned.
        nodes: The operations of its own forward, without those of its children.
        children: The calls made by its forward, in order.
        is_lent: Whether it ran with other parameters or buffers than it holds, as
            `torch.func.functional_call` runs it.
        returned_at: Number of its nodes when its forward returned; hooks made others.
        branches_on: What its own forward may branch on, e.g. the values of tensors;
            empty if nothing is known.
        routes_on: The same if all of it are integers computed by the model: which rows
            go to which expert.
    """

    module: nn.Module
    path: str
    parent: ModuleCall | None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    children: list[ModuleCall] = field(default_factory=list)
    is_lent: bool = False
    returned_at: int = 0
    branches_on: str = ""
    routes_on: str = ""

    def walk(self) -> Iterator[ModuleCall]:
        """Yield it and all calls within it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def mark_differences(self, other: ModuleCall, branches_on: str) -> None:
        """Set `branches_on` on each call that ran other operations than in `other`."""
        same = [node.label for node in self.nodes] == [n.label for n in other.nodes]
        pairs = list(zip(self.children, other.children, strict=False))
        same &= len(self.children) == len(other.children)
        if not same or any(one.path != two.path for one, two in pairs):
            self.branches_on = self.branches_on or branches_on
        for one, two in pairs:
            if one.path == two.path:
                one.mark_differences(two, branches_on)


TorchFunction = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Trace:
    """One traced forward.

    Attributes:
        graph: The nodes and values.
        root: The call of the model itself.
        call_of: The module call whose own forward ran a node.
        slots: Every slot of a parameter or buffer, by (module, attribute).
        result: The output of the model.
        functions: The torch function of each node, with its arguments.
        tied: The other slots that hold the same parameter.
    """

    graph: Graph
    root: ModuleCall
    call_of: dict[Node, ModuleCall]
    slots: dict[tuple[nn.Module, str], Slot]
    result: Any
    functions: dict[Node, TorchFunction]
    tied: dict[Slot, tuple[Slot, ...]]


def identities(module: nn.Module) -> list[int]:
    """Return those of the parameters and buffers that a module holds itself."""
    return [id(t) for t in (*module._parameters.values(), *module._buffers.values())]
