"""A batch norm that is a branch of its own, folded into a linear map parallel to it.

RepVGG's identity branch: conv(x) + bn(x) is another convolution of x, plus x. It needs
no gauge, since up to the sum neither branch is an affine map of the original one.
"""

from __future__ import annotations

from dataclasses import dataclass

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import Gauges, Graph, Refusal, Value
from normkit.fold.ir.nodes import Add, BatchNorm, Linear
from normkit.fold.ir.written_out import is_copy, sources
from normkit.fold.search.aliasing import needs_copy
from normkit.fold.search.solve import Solution

__all__ = ["solve_parallel_branch"]


def solve_parallel_branch(graph: Graph, norms: list[BatchNorm]) -> Solution:
    """Fold a batch norm that is a branch of its own into a parallel linear map.

    L·x + T(x) = (L + diag(s − 1))·x + t + x, when both are summed: the branch stays
    as a plain x, as in RepVGG's identity branch.

    Raises:
        Refusal: there is no such map.
    """
    if len(norms) != 1:
        raise Refusal("it runs several times")
    (norm,) = norms
    affine = norm.finite_affine()
    source = sources(norm.inputs[0])[-1]
    for sibling in _siblings(norm):
        linear, weight = sibling.linear, sibling.weight
        if sources(linear.inputs[0])[-1] is not source:
            continue
        x, y = linear.inputs[0], linear.outputs[0]
        if norm.channel_dim != linear.input_dim % len(x.shape) or x.shape != y.shape:
            continue
        edits = linear.with_diagonal(
            Affine((affine.scale - 1) * weight, affine.shift * weight)
        )
        for slot in edits:
            others = [reader for reader in slot.readers if reader is not linear]
            if others:
                raise Refusal(f"{slot.name} is also used by {others[0].label}")
        return Solution(
            "parallel",
            edits,
            norms=(norm,),
            touched=(),
            edited=(linear,),
            created=frozenset(slot for slot in edits if slot.tensor is None),
            # Up to the sum neither is an affine map of the original one.
            gauges=Gauges(dict.fromkeys(sibling.between, Gauge(None, None))),
            needs_copy=needs_copy(graph, norms),
        )
    raise Refusal("no parallel linear map is added to it")


@dataclass(frozen=True)
class _Sibling:
    """A linear map in the same sum as a batch norm.

    Attributes:
        linear: The map.
        weight: The norm's factor in the sum divided by that of the map.
        between: The values from the map and from the norm up to the sum.
    """

    linear: Linear
    weight: float
    between: tuple[Value, ...]


def _siblings(norm: BatchNorm) -> list[_Sibling]:
    top, factor = norm.outputs[0], 1.0
    climbed: list[Value] = []
    found: list[_Sibling] = []

    def descend(value: Value, weight: float, passed: tuple[Value, ...]) -> None:
        node, passed = value.producer, (*passed, value)
        if node is None or len(value.readers) != 1 or value.pinned:
            return
        if isinstance(node, Linear):
            found.append(_Sibling(node, factor / weight, (*climbed, *passed)))
        elif isinstance(node, Add):
            for term, own in zip(node.inputs, node.factors, strict=True):
                descend(term, weight * own, passed)
        elif is_copy(node):
            descend(node.inputs[0], weight, passed)

    while len(top.readers) == 1 and not top.pinned:
        (node,) = top.readers
        climbed.append(top)
        if isinstance(node, Add):
            if node.inputs.count(top) != 1:
                break
            factor *= node.factors[node.inputs.index(top)]
            for term, other in zip(node.inputs, node.factors, strict=True):
                if term is not top and factor and other:
                    descend(term, other, ())
        elif not is_copy(node):
            break
        top = node.outputs[0]
    return found
