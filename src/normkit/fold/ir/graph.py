"""The graph of a network: values, the slots that hold parameters, and the nodes.

A node has one rule, `propagate`: given the gauges already set on the values around it,
return the gauges on the values not yet set under which the folded node computes the
same network. The rule returns a list of alternatives, each a dict of gauges to add; one
empty dict means that nothing more is needed. Without any it raises `Refusal` with the
reason. A rule that relies on an unchanged value sets the identity there.

    linear, norms     any map per channel, by editing weight and bias
    move              the map follows the elements
    add               Σ fᵢ·xᵢ + c: one scale for all, the shifts add up
    scale, gate       a factor: constants pass both, a dynamic factor the scale only
    commuting         relu, max, mean: the maps that they commute with
    matmul            a map of v's features; its shift if the rows sum to 1 (softmax)
    opaque            nothing
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from torch import Tensor

from normkit.errors import NormkitError
from normkit.fold.ir.gauge import Gauge

__all__ = [
    "NOTHING_MORE",
    "Alternative",
    "Gauges",
    "Graph",
    "Node",
    "Refusal",
    "Slot",
    "Value",
    "slots_of",
]


class Refusal(NormkitError):  # noqa: N818 - an answer, not a failure
    """Reason why a change of gauge is not possible, as printed in the ledger.

    Attributes:
        visited: The nodes on which the refusal depends; None if they are not known.
    """

    visited: frozenset[Node] | None = None


@dataclass(eq=False, repr=False)
class Slot:
    """One place that holds a parameter or a constant of the network.

    Attributes:
        name: Its path, e.g. `layer1.0.conv1.weight`.
        tensor: The current content; None while it is empty (a bias that a fold may
            create).
        locked: Reason why it must not be edited; empty if it may be.
        readers: The nodes whose result depends on it.
    """

    name: str
    tensor: Tensor | None
    locked: str = ""
    readers: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Slot {self.name}>"


@dataclass(eq=False, repr=False)
class Value:
    """One tensor of the network; a write in place makes a new value.

    Attributes:
        shape: Its shape in the traced run.
        producer: The node that computes it; None for an input of the model.
        readers: The nodes that read it.
        pinned: Reason why it must not change; empty if it may.
        constant: Its content, if that depends neither on the model's inputs nor on a
            slot that may be edited.
        roots: The slots it is computed from, if from slots alone.
        picked_from: The fixed value of which it holds rows that the input picks.
        alias_group: Values with the same number share memory.
    """

    shape: tuple[int, ...]
    producer: Node | None = None
    readers: list[Node] = field(default_factory=list)
    pinned: str = ""
    constant: Tensor | None = None
    roots: tuple[Slot, ...] = ()
    picked_from: Value | None = None
    alias_group: int = -1

    @property
    def is_fixed(self) -> bool:
        """True if it is the same in every run of the model."""
        return self.constant is not None or bool(self.roots)

    @property
    def name(self) -> str:
        """Its name in messages."""
        if self.producer is None:
            return "the model's input"
        return f"the output of {self.producer.label}"

    def __repr__(self) -> str:
        return f"<Value {self.shape}, {self.name}>"


@dataclass(eq=False, repr=False)
class Node:
    """One operation of the traced network.

    Attributes:
        label: Its name in messages: `'layer1.conv2'`, or `add in 'layer1'`.
        inputs: The values it reads, parameters excepted.
        outputs: The values it computes.
        position: Its place in the order of execution.
    """

    label: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    position: int = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Return the gauges to add, as alternatives; see the module's docstring."""
        raise NotImplementedError

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the new content of its slots under `gauges`, float64."""
        return {}

    def read(self, value: Value) -> Tensor:
        """Return the content of its output `value`, if that is fixed."""
        raise Refusal(f"{value.name} is computed anew in every run")

    def edit_for(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """Return the edit after which `read(value)` is `new`, for the node `label`."""
        raise Refusal(f"the weight of {label} is computed in its forward, not stored")

    def is_touched(self, gauges: Gauges) -> bool:
        """Return True if `gauges` change a value that it reads or computes."""
        return any(gauges.changed(value) for value in (*self.inputs, *self.outputs))


@dataclass(eq=False, repr=False)
class Graph:
    """All nodes in the order of execution.

    Attributes:
        nodes: In execution order, which is a topological order.
        inputs: The arguments of the model.
        outputs: The values that the model returned.
        writes: (position in `nodes`, alias group) of each in-place write.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)

    @functools.cached_property
    def by_alias_group(self) -> dict[int, list[Value]]:
        """Its values by the memory that they share; the graph must be complete."""
        groups: dict[int, list[Value]] = {}
        for value in (*self.inputs, *(v for node in self.nodes for v in node.outputs)):
            groups.setdefault(value.alias_group, []).append(value)
        return groups


class Gauges(dict[Value, Gauge]):
    """The gauges set so far; a value without one is unchanged."""

    def of(self, value: Value) -> Gauge:
        """Return the gauge of `value`, the identity if none was set."""
        return self.get(value) or Gauge.identity(len(value.shape))

    def changed(self, value: Value) -> bool:
        """Return True if `value` is stored as another tensor than it was."""
        gauge = self.get(value)
        return gauge is not None and not gauge.is_identity


def slots_of(node: Node) -> list[Slot]:
    """Return each slot on which the result of `node` depends, once."""
    fields = vars(node).values()
    values = [*node.inputs, *(v for v in fields if isinstance(v, Value))]
    values += [value.picked_from for value in values if value.picked_from is not None]
    slots = [slot for value in values for slot in value.roots]
    # An empty slot that an edit may fill is read, too, by every call.
    slots += [slot for slot in fields if isinstance(slot, Slot)]
    return list(dict.fromkeys(slots))


Alternative = dict[Value, Gauge]
NOTHING_MORE: list[Alternative] = [{}]
