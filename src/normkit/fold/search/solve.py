"""Remove a batch norm by changing the gauges around it.

With T the batch norm's own map, u its input and y its output, the identity may stand
in its place when the stored u and the stored y are one tensor. There are five ways to
divide T between the two sides:

    before     stored u = T(u)                        all of it before
    after      y = T(stored y)                        all of it after
    straddle   stored u = ±u + t/|s|, y = |s|·stored  the shift before, the size after
    lift       stored u = u + t/s,  y = s·stored      the shift before, the scale after
    opposite   stored u = s·u,  y = stored + t        the scale before, the shift after

Straddle is for a relu behind, which lets no sign through; lift for a residual stream
before, all of which would change its sign. A sixth, in `parallel_branch`, needs no
gauge. Where all of them are refused, the scale alone may still go, and a sum per
channel stays. Each way sets the first gauges; `settle` then asks the nodes around them
(`ir.nodes`) which other gauges follow, until every node is settled or one refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import Gauges, Graph, Node, Refusal, Slot, Value
from normkit.fold.ir.nodes import BatchNorm, Move, NormAffine
from normkit.fold.search.aliasing import needs_copy

__all__ = ["PARTIAL_WAYS", "WAYS", "Search", "Solution", "solve"]

# The search stops after this many visits of nodes; real folds need under 50.
_MAX_VISITS = 4000


@dataclass(frozen=True)
class Solution:
    """A set of edits that lets some batch norms go.

    Attributes:
        way: Its name in `WAYS`, `PARTIAL_WAYS`, `NORM_WAYS`, or "parallel".
        edits: The new content of each slot, float64.
        norms: The calls that become the identity, or lose weight and bias.
        touched: The other nodes around a changed value, in order of execution.
        edited: Those of them that are edited.
        created: The slots that were empty.
        gauges: The gauge of each value.
        needs_copy: Whether a copy must replace the norms, not the identity, because
            one of the tensors is written to in place.
        remainder: The shift per channel that stays in the place of each norm, or its
            new bias; None if nothing stays.
    """

    way: str
    edits: dict[Slot, Tensor]
    norms: tuple[Node, ...]
    touched: tuple[Node, ...]
    edited: tuple[Node, ...]
    created: frozenset[Slot]
    gauges: Gauges
    needs_copy: bool = False
    remainder: Tensor | None = None

    def describe(self) -> str:
        """Return where the batch norm went, in words for the ledger."""
        first = min(norm.position for norm in self.norms)
        before = [node.label for node in self.edited if _place(node) < first]
        after = [node.label for node in self.edited if _place(node) >= first]
        parts = []
        if before:
            parts.append(f"into {_listed(before)} before it")
        if after:
            parts.append(f"into {_listed(after)} after it")
        if self.way == "parallel":
            labels = _listed([node.label for node in self.edited])
            parts = [f"into {labels} in a parallel branch"]
        if not parts and not isinstance(self.norms[0], BatchNorm):
            return "its weight was 1 already"
        return " and ".join(parts) or "it was the identity already"


def solve(
    graph: Graph, norms: list[BatchNorm], way: str, *, as_if_positive: bool = False
) -> Solution:
    """Find the edits that remove all calls `norms` of one batch norm at once.

    Args:
        graph: Where they are.
        norms: The calls of one module, each with its own map.
        way: A name in `WAYS` or `PARTIAL_WAYS`.
        as_if_positive: Drop the sign of every scale. The result is wrong as an edit; it
            tells whether negative scales alone stand in the way.

    Raises:
        Refusal: it cannot be done this way; the message gives the reason.
    """
    gauges = Gauges()
    todo: list[Node] = []
    search = Search(set(norms))
    remainder: Tensor | None = None
    for norm in norms:
        u, y = norm.inputs[0], norm.outputs[0]
        affine = norm.finite_affine()
        if as_if_positive:
            affine = Affine(affine.scale.abs(), affine.shift)
        shape = [1] * len(u.shape)
        shape[norm.channel_dim] = norm.channels
        affine = Affine(affine.scale.reshape(shape), affine.shift.reshape(shape))
        if way in WAYS:
            before, after = WAYS[way](affine)
        else:
            before, after, shift = PARTIAL_WAYS[way](affine)
            if remainder is not None and not torch.equal(remainder, shift.reshape(-1)):
                raise Refusal("its calls would keep different shifts")
            remainder = shift.reshape(-1)
        for value, gauge in ((u, before), (y, after)):
            if value in gauges and not gauges[value].agrees_with(gauge):
                raise Refusal(f"{value.name} would need two different maps")
            search.put(gauges, value, gauge)
            todo += search.around(value)
    return search.solution(
        way,
        gauges,
        todo,
        needs_copy=remainder is None and needs_copy(graph, norms),
        remainder=remainder,
    )


def _place(node: Node) -> int:
    """Return the position of `node`; of a parameter, of the first that reads it."""
    if node.position >= 0:
        return node.position
    return min((r.position for v in node.outputs for r in v.readers), default=-1)


def _listed(labels: list[str]) -> str:
    labels = list(dict.fromkeys(labels))
    if len(labels) > 3:
        labels = [*labels[:3], f"{len(labels) - 3} more"]
    return ", ".join(labels)


def _before(affine: Affine) -> tuple[Gauge, Gauge]:
    return Gauge.storing(affine), Gauge.identity(affine.scale.dim())


def _after(affine: Affine) -> tuple[Gauge, Gauge]:
    return Gauge.identity(affine.scale.dim()), Gauge.reading(affine)


def _straddle(affine: Affine) -> tuple[Gauge, Gauge]:
    size, sign = affine.scale.abs(), affine.scale.sign()
    if bool((size == 0).any()):
        raise Refusal("a scale of 0 cannot follow its shift")
    zero = torch.zeros_like(size)
    return (
        Gauge.storing(Affine(sign, affine.shift / size)),
        Gauge.reading(Affine(size, zero)),
    )


def _lift(affine: Affine) -> tuple[Gauge, Gauge]:
    if bool((affine.scale == 0).any()):
        raise Refusal("a scale of 0 cannot follow its shift")
    one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.scale)
    return (
        Gauge.storing(Affine(one, affine.shift / affine.scale)),
        Gauge.reading(Affine(affine.scale, zero)),
    )


def _opposite(affine: Affine) -> tuple[Gauge, Gauge]:
    one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.scale)
    return (
        Gauge.storing(Affine(affine.scale, zero)),
        Gauge.reading(Affine(one, affine.shift)),
    )


WAYS: dict[str, Callable[[Affine], tuple[Gauge, Gauge]]] = {
    "before": _before,
    "after": _after,
    "straddle": _straddle,
    "lift": _lift,
    "opposite": _opposite,
}


def _scale_before(affine: Affine) -> tuple[Gauge, Gauge, Tensor]:
    zero = torch.zeros_like(affine.scale)
    same = Gauge.identity(affine.scale.dim())
    return Gauge.storing(Affine(affine.scale, zero)), same, affine.shift


def _scale_after(affine: Affine) -> tuple[Gauge, Gauge, Tensor]:
    if bool((affine.scale == 0).any()):
        raise Refusal("a scale of 0 cannot follow its shift")
    zero = torch.zeros_like(affine.scale)
    same = Gauge.identity(affine.scale.dim())
    after = Gauge.reading(Affine(affine.scale, zero))
    return same, after, affine.shift / affine.scale


# Those that leave y = x + shift in the place of the batch norm.
PARTIAL_WAYS: dict[str, Callable[[Affine], tuple[Gauge, Gauge, Tensor]]] = {
    "scale before": _scale_before,
    "scale after": _scale_after,
}


class Search:
    """Depth-first search for the first alternatives under which all nodes settle."""

    def __init__(self, removed: set[BatchNorm] | set[NormAffine]) -> None:
        self.removed: set[Node] = {*removed}
        self.visits = 0
        self.visited: set[Node] = set()

    def solution(
        self,
        way: str,
        gauges: Gauges,
        todo: list[Node],
        *,
        needs_copy: bool,
        remainder: Tensor | None,
    ) -> Solution:
        """Return the solution that follows from the first `gauges`.

        Raises:
            Refusal: there is none; it names the nodes on which that depends.
        """
        try:
            edits, edited, settled = self.settle(gauges, todo)
        except Refusal as refusal:
            refusal.visited = frozenset({*self.visited, *self.removed})
            raise
        near = {node for value in settled for node in self.around(value)}
        touched = sorted(
            (node for node in near if node.is_touched(settled)),
            key=lambda node: node.position,
        )
        return Solution(
            way,
            edits,
            norms=tuple(sorted(self.removed, key=lambda node: node.position)),
            touched=tuple(touched),
            edited=tuple(node for node in touched if node in edited),
            created=frozenset(slot for slot in edits if slot.tensor is None),
            gauges=settled,
            needs_copy=needs_copy,
            remainder=remainder,
        )

    def put(self, gauges: Gauges, value: Value, gauge: Gauge) -> None:
        """Set a gauge; refuse if the value must not change."""
        if value.pinned and not gauge.is_identity:
            raise Refusal(f"{value.name} {value.pinned}")
        if value.constant is not None and not gauge.is_identity:
            raise Refusal(f"{value.name} is a constant of the code")
        gauges[value] = gauge

    def around(self, value: Value) -> list[Node]:
        """Return the nodes to ask again after `value` changed."""
        return [node for node in _around(value) if node not in self.removed]

    def settle(
        self, gauges: Gauges, todo: list[Node]
    ) -> tuple[dict[Slot, Tensor], set[Node], Gauges]:
        """Return the edits, the nodes they belong to, and all gauges."""
        todo = list(dict.fromkeys(todo))
        while todo:
            self.visits += 1
            if self.visits > _MAX_VISITS:
                raise Refusal("the search took too many steps")
            # Joins and cuts last: they cost most, and never refuse what others permit.
            node = next((n for n in todo if not _is_costly(n)), todo[0])
            todo.remove(node)
            self.visited.add(node)
            alternatives = node.propagate(gauges)
            for alternative in alternatives[:-1]:
                try:
                    return self.settle(*self._extended(gauges, alternative, todo))
                except Refusal:  # noqa: PERF203 - a search ends in refusals
                    continue
            gauges, todo = self._extended(gauges, alternatives[-1], todo)
        return *self._edits(gauges), gauges

    def _extended(
        self, gauges: Gauges, alternative: dict[Value, Gauge], todo: list[Node]
    ) -> tuple[Gauges, list[Node]]:
        if not alternative:
            return gauges, todo
        extended = Gauges(gauges)
        more = list(todo)
        for value, gauge in alternative.items():
            self.put(extended, value, gauge)
            more += [node for node in self.around(value) if node not in more]
        return extended, more

    def _edits(self, gauges: Gauges) -> tuple[dict[Slot, Tensor], set[Node]]:
        """Return the edits of all nodes, which must agree, and the nodes with any."""
        nodes = dict.fromkeys(n for value in gauges for n in self.around(value))
        edits: dict[Slot, Tensor] = {}
        askers: dict[Slot, set[Node]] = {}
        for node in nodes:
            for slot, tensor in node.edits(gauges).items():
                asked = edits.setdefault(slot, tensor)
                if asked is not tensor and not torch.allclose(
                    asked, tensor, rtol=1e-11, atol=1e-14
                ):
                    raise Refusal(
                        f"{slot.name} is used by several calls, which need it different"
                    )
                askers.setdefault(slot, set()).add(node)
        for slot, nodes_asking in askers.items():
            for reader in slot.readers:
                if reader in nodes_asking or reader in self.removed:
                    continue
                # It may read the slot as a tensor among others, whose gauge it permits.
                read = [value for value in reader.inputs if slot in value.roots]
                if not read or any(value not in gauges for value in read):
                    raise Refusal(f"{slot.name} is also used by {reader.label}")
        return edits, {
            node for nodes_asking in askers.values() for node in nodes_asking
        }


def _is_costly(node: Node) -> bool:
    return isinstance(node, Move) and node.replay is not None


def _around(value: Value) -> list[Node]:
    nodes = [] if value.producer is None else [value.producer]
    return [*nodes, *dict.fromkeys(value.readers)]
