"""The kinds of nodes, and what each can bear: see `node` for the rules of the rules."""

from normkit.fold.nodes.arithmetic import Add, Gate, Scale
from normkit.fold.nodes.move import Move
from normkit.fold.nodes.node import Node, Opaque, Stored
from normkit.fold.nodes.through import Mix, Through
from normkit.fold.nodes.weighted import BatchNorm, Linear, Table, Tail

__all__ = [
    "Add",
    "BatchNorm",
    "Gate",
    "Linear",
    "Mix",
    "Move",
    "Node",
    "Opaque",
    "Scale",
    "Stored",
    "Table",
    "Tail",
    "Through",
]
