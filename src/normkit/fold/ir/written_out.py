"""Layer and RMS norms written out: x·r(x)·weight + bias, r one number per row.

Only what becomes of the weight depends on this: it may be folded whatever x·r is.
"""

from __future__ import annotations

from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes import (
    Add,
    BatchNorm,
    Gate,
    Move,
    NormAffine,
    Quotient,
    Scale,
)

__all__ = ["as_norm_affine", "dims_of", "is_copy", "sources"]

# T5 and Llama reach x in four steps from r, a variance with its mean in eight.
_MAX_STEPS = 24


def as_norm_affine(scale: Node) -> tuple[NormAffine, list[Node]] | None:
    """Return one node for the end of a norm, and the nodes it replaces, else None.

    Args:
        scale: The product with the weight.
    """
    if not isinstance(scale, Scale) or scale.weight is None or not scale.weight.roots:
        return None
    x, y = scale.inputs[0], scale.outputs[0]
    dims = dims_of(scale.weight, y)
    if not dims or x.shape != y.shape or not _is_normalized(x, dims):
        return None
    node = NormAffine(scale.label, [x], [y], weight=scale.weight, dims=dims)
    replaced: list[Node] = [scale]
    found = _sum_after(y, dims)
    if found is not None:
        chain, node.bias = found
        node.outputs = list(chain[-1].outputs)
        replaced += chain
    return node, replaced


def sources(value: Value) -> list[Value]:
    """Return `value` and what it is an unchanged copy of, the last one first made."""
    found = [value]
    while True:
        node = found[-1].producer
        if node is None or not is_copy(node):
            return found
        found.append(node.inputs[0])


def is_copy(node: Node) -> bool:
    """Return True if the output of `node` is its input, element by element."""
    if isinstance(node, BatchNorm):
        return node.is_removed
    return isinstance(node, Move) and node.replay is None


def dims_of(weight: Value, y: Value) -> tuple[int, ...]:
    """Return the dimensions of `y` that a weight runs along in full, or ()."""
    extra = len(y.shape) - len(weight.shape)
    if extra < 0:
        return ()
    dims = tuple(d + extra for d, size in enumerate(weight.shape) if size > 1)
    return dims if all(weight.shape[d - extra] == y.shape[d] for d in dims) else ()


def _sum_after(y: Value, dims: tuple[int, ...]) -> tuple[list[Node], Value] | None:
    """Return the nodes from `y` to a sum with a bias that alone reads it, the bias."""
    chain: list[Node] = []
    while len(y.readers) == 1 and not y.pinned:
        (node,) = y.readers
        chain.append(node)
        if is_copy(node):
            y = node.outputs[0]
            continue
        if not isinstance(node, Add) or node.constant is not None:
            return None
        others = [value for value in node.inputs if value is not y]
        if len(node.inputs) != 2 or len(others) != 1 or node.factors != [1.0, 1.0]:
            return None
        if not others[0].roots or dims_of(others[0], node.outputs[0]) != dims:
            return None
        return (chain, others[0]) if node.outputs[0].shape == y.shape else None
    return None


def _is_normalized(value: Value, dims: tuple[int, ...]) -> bool:
    """Return True if it is x·r or x/r, r one number for all of `dims` made from x."""
    node = sources(value)[-1].producer
    if isinstance(node, Quotient):
        pairs = [(node.inputs[0], node.inputs[1])]
    elif isinstance(node, Gate):
        pairs = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    else:
        return False
    rank = len(value.shape)
    for x, factor in pairs:
        extra = rank - len(factor.shape)
        has_one = all(d < extra or factor.shape[d - extra] == 1 for d in dims)
        if has_one and x.shape == value.shape and _is_made_from(factor, x):
            return True
    return False


def _is_made_from(value: Value, x: Value) -> bool:
    """Return True if `value` is computed from `x`, or from what `x` was centered on."""
    wanted = set(sources(x))
    maker = sources(x)[-1].producer
    if isinstance(maker, Add):
        wanted |= {source for term in maker.inputs for source in sources(term)}
    todo = [value]
    for _ in range(_MAX_STEPS):
        if not todo:
            return False
        node = todo.pop(0).producer
        for each in () if node is None else node.inputs:
            if each in wanted:
                return True
            todo.append(each)
    return False
