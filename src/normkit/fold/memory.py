"""Which values share memory, and whether that matters once a batch norm is gone.

A batch norm makes a new tensor; the identity in its place hands on the old one. Where
somebody writes to one of the two in place while the other is still needed, the
identity must copy.
"""

from __future__ import annotations

from normkit.fold.graph import Graph, Value
from normkit.fold.nodes import BatchNorm

__all__ = ["needs_copies"]


def needs_copies(graph: Graph, norms: list[BatchNorm]) -> bool:
    """Whether a write in place would hit what somebody else still needs.

    Without the batch norm its output is its input, one memory for both.
    """
    for norm in norms:
        u, y = norm.inputs[0], norm.outputs[0]
        groups = (_family(graph, u), _family(graph, y))
        for position, group in graph.writes:
            for mine, other in (groups, groups[::-1]):
                if group not in {value.alias_group for value in mine}:
                    continue
                readers = [n for value in other for n in value.readers if n is not norm]
                if any(node.position > position for node in readers):
                    return True
                if any(value.pinned for value in other):
                    return True
    return False


def _family(graph: Graph, value: Value) -> list[Value]:
    """The values that share memory with `value`, over batch norms gone before."""
    family, todo = [], [value.alias_group]
    groups: set[int] = set()
    everything = [*graph.inputs, *(v for node in graph.nodes for v in node.outputs)]
    while todo:
        group = todo.pop()
        if group in groups:
            continue
        groups.add(group)
        for member in everything:
            if member.alias_group != group:
                continue
            family.append(member)
            gone = [n for n in member.readers if isinstance(n, BatchNorm) and n.is_gone]
            todo += [n.outputs[0].alias_group for n in gone]
            maker = member.producer
            if isinstance(maker, BatchNorm) and maker.is_gone:
                todo.append(maker.inputs[0].alias_group)
    return family
