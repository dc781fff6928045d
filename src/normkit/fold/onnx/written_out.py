"""A batch norm that an exporter wrote out as a product and a sum of constants."""

from __future__ import annotations

from torch import Tensor

from normkit.fold.graph import Value
from normkit.fold.nodes import Add, Node, Scale

__all__ = ["affine_of", "written_out"]


def written_out(node: Node) -> list[Node]:
    """A product with a constant, and the sum with one that alone reads it."""
    if not isinstance(node, Scale) or len(node.outputs) != 1:
        return []
    y = node.outputs[0]
    if y.pinned or len(y.readers) != 1 or not isinstance(y.readers[0], Add):
        return []
    (add,) = y.readers
    others = [v for v in add.inputs if v is not y]
    if len(add.inputs) != 2 or len(others) != 1 or not others[0].roots:
        return []
    return [node, add]


def affine_of(chain: list[Node]) -> tuple[Tensor, Tensor, int] | None:
    """(scale, shift, the one dimension they run along) of what `written_out` found."""
    scale_node, add = chain
    assert isinstance(scale_node, Scale)
    assert isinstance(add, Add)
    x, y = scale_node.inputs[0], add.outputs[0]
    if x.shape != y.shape or scale_node.weight is None:
        return None
    own = add.inputs.index(scale_node.outputs[0])
    factor = add.factors[own] * _content(scale_node.weight)
    summand = add.factors[1 - own] * _content(add.inputs[1 - own])
    rank = len(y.shape)
    if max(factor.dim(), summand.dim()) > rank:
        return None
    parts = [
        t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in (factor, summand)
    ]
    dims = {d for t in parts for d in range(rank) if t.shape[d] > 1}
    if dims != {1}:
        return None  # A layer norm's weight runs along the last dimension.
    vectors = [t.reshape(-1).expand(y.shape[1]).clone() for t in parts]
    return vectors[0], vectors[1], 1


def _content(value: Value) -> Tensor:
    slot = value.roots[0]
    assert slot.tensor is not None
    return slot.tensor
