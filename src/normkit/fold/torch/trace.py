"""One forward pass of a torch model, read: which module call ran which node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normkit.fold.ir.graph import Graph, Node, Slot, Value

__all__ = ["ModuleCall", "Trace"]


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Attributes:
        module: The module.
        path: Its first name in the model, "" for the model itself.
        parent: The call within which it happened.
        inputs: The tensors that it was called with.
        outputs: The tensors that it returned.
        nodes: What ran in its own forward, not in a child's.
        children: The calls made by its forward, in order.
        looked_at_values: Whether its own forward read a tensor's values into Python.
    """

    module: nn.Module
    path: str
    parent: ModuleCall | None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    children: list[ModuleCall] = field(default_factory=list)
    looked_at_values: bool = False


@dataclass(eq=False)
class Trace:
    """One forward pass, read.

    Attributes:
        graph: The nodes and values.
        root: The call of the model itself.
        call_of: The module call whose own forward ran a node.
        slots: Every place that holds a parameter or buffer, by (module, attribute).
        result: What the model returned.
    """

    graph: Graph
    root: ModuleCall
    call_of: dict[Node, ModuleCall]
    slots: dict[tuple[nn.Module, str], Slot]
    result: Any
