"""Memory that values share: does a removed batch norm have to leave a copy behind?

A batch norm makes a new tensor; the identity in its place returns its input. If one of
the two is written to in place while the other is still read, the identity must copy.
"""

from __future__ import annotations

from normkit.fold.ir.graph import Graph, Value
from normkit.fold.ir.nodes import BatchNorm

__all__ = ["needs_copy"]


def needs_copy(graph: Graph, norms: list[BatchNorm]) -> bool:
    """Return True if an in-place write would change a tensor that is read later.

    Without the batch norm its output is its input, one memory for both.
    """
    if not graph.writes:
        return False
    by_group = graph.by_alias_group
    for norm in norms:
        families = [_family(by_group, v) for v in (norm.inputs[0], norm.outputs[0])]
        for own, other in (families, families[::-1]):
            groups = {value.alias_group for value in own}
            readers = [n for value in other for n in value.readers if n is not norm]
            for position in (at for at, group in graph.writes if group in groups):
                if any(node.position > position for node in readers):
                    return True
                if any(value.pinned for value in other):
                    return True
    return False


def _family(by_group: dict[int, list[Value]], value: Value) -> list[Value]:
    """Return the values that share memory with `value`, also across removed norms."""
    family: list[Value] = []
    todo = [value.alias_group]
    groups: set[int] = set()
    while todo:
        group = todo.pop()
        if group in groups:
            continue
        groups.add(group)
        for member in by_group.get(group, []):
            family.append(member)
            for node in (*member.readers, member.producer):
                if isinstance(node, BatchNorm) and node.is_removed:
                    todo += [v.alias_group for v in (*node.inputs, *node.outputs)]
    return family
