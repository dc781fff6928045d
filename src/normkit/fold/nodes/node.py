"""What each kind of node can bear: the rules by which a gauge crosses the network.

A rule answers one question. Given the gauges already set on the values around a
node, which gauges on the values not yet set let the folded node compute the same
network? It answers with a list of alternatives, each a dict of gauges to add; one
empty dict says that nothing more is needed. If there is none it raises `Refusal` with
the reason. A rule that relies on a value staying as it was says so by setting the
identity there.

    linear, norms     any map per channel, by editing weight and bias
    moves             a map is carried along with the elements it belongs to
    add               Σ fᵢ·xᵢ + c: one scale for all, the shifts add up
    scale, gate       a factor: constants pass both, a dynamic factor the scale only
    relu, max, mean   what they commute with
    attention         a map of v's features, since rows of a softmax sum to 1
    anything else     nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.gauge import Gauge, compact
from normkit.fold.graph import Gauges, Refusal, Slot, Value

__all__ = [
    "NOTHING_MORE",
    "Alternative",
    "Node",
    "Opaque",
    "Stored",
    "carry_one",
    "close",
    "current",
    "editable",
    "fill",
    "fit",
    "held",
    "lead",
    "needs_channels_only",
    "put",
    "store",
    "stored_direction",
    "storing",
    "true_direction",
]

Alternative = dict[Value, Gauge]
NOTHING_MORE: list[Alternative] = [{}]


@dataclass(eq=False, repr=False)
class Node:
    """One operation of the traced network.

    Attributes:
        label: As a person finds it: `'layer1.conv2'`, or `add in 'layer1'`.
        inputs: The values it reads, parameters excepted.
        outputs: The values it makes.
        position: Its place in the order of execution.
    """

    label: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    position: int = -1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Which gauges on the values not yet set make the node right again."""
        raise NotImplementedError

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """What its slots must hold under `gauges`, float64."""
        return {}

    def content(self, value: Value) -> Tensor:
        """What its output `value` holds now, if that is fixed."""
        raise Refusal(f"{value.name} is computed anew in every run")

    def holding(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """The edit after which `content(value)` is `new`, for the node `label`."""
        raise Refusal(f"the weight of {label} is computed in its forward, not held")

    def is_touched(self, gauges: Gauges) -> bool:
        """Whether any value around it is stored as something else."""
        return any(gauges.moved(value) for value in (*self.inputs, *self.outputs))


@dataclass(eq=False, repr=False)
class Opaque(Node):
    """An operation about which nothing is known, or that commutes with nothing.

    Attributes:
        softmax_dim: The dimension over which its output sums to 1, if it is a softmax.
    """

    softmax_dim: int | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Everything around it must stay as it was."""
        for value in self.inputs:
            if gauges.moved(value):
                raise Refusal(
                    f"{self.label} reads {value.name} and bears no change of it"
                )
        for value in self.outputs:
            if gauges.moved(value):
                raise Refusal(f"nothing can be moved into {self.label}")
        return NOTHING_MORE


@dataclass(eq=False, repr=False)
class Stored(Node):
    """A parameter read as a tensor of the network (a position embedding, a token)."""

    slot: Slot | None = None

    def content(self, value: Value) -> Tensor:
        """What the slot holds."""
        assert self.slot is not None
        assert self.slot.tensor is not None
        return self.slot.tensor.to("cpu", torch.float64)

    def holding(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """The slot, edited."""
        return {editable(self.slot, label): new}

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map, by editing the parameter."""
        if self.is_touched(gauges):
            editable(self.slot, self.label)
            stored_direction(gauges.of(self.outputs[0]), self.label)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The parameter in its new gauge."""
        if self.slot is None or not self.is_touched(gauges):
            return {}
        to_stored = stored_direction(gauges.of(self.outputs[0]), self.label)
        return {self.slot: to_stored(current(self.outputs[0]))}


def current(value: Value) -> Tensor:
    """What a fixed value holds after the edits made so far; float64, on the CPU."""
    if value.constant is not None:
        return value.constant.to("cpu", torch.float64)
    if value.producer is None:
        raise Refusal(f"{value.name} is not the same in every run")
    return value.producer.content(value)


def store(value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
    """The edit after which `value` holds `new`."""
    if value.producer is None:
        raise Refusal(f"the weight of {label} is computed in its forward, not held")
    return value.producer.holding(value, new, label)


def held(value: Value | None, slot: Slot | None) -> Tensor | None:
    """A weight or bias as it is now: the one read, or the one created in `slot`."""
    if value is not None:
        return current(value)
    if slot is None or slot.tensor is None:
        return None
    return slot.tensor.to("cpu", torch.float64)


def put(
    value: Value | None, slot: Slot | None, new: Tensor, label: str, what: str
) -> dict[Slot, Tensor]:
    """The edit after which `held` answers `new`."""
    if value is not None:
        return store(value, new, label)
    return {editable(slot, label, what): new}


def fit(gauge: Gauge, shape: tuple[int, ...]) -> Gauge | None:
    """`gauge` for a tensor of `shape` that is broadcast to the gauge's own."""
    extra = gauge.rank - len(shape)
    for dim in gauge.depends_on:
        if dim < extra or shape[dim - extra] == 1:
            return None
    if extra <= 0:
        return gauge
    return gauge.map(lambda t: t.reshape(t.shape[extra:]))


def storing(affine: Affine) -> Gauge:
    """`Gauge.storing` with scale and shift in their smallest shapes."""
    scale, shift = affine.scale, affine.shift
    rank = max(scale.dim(), shift.dim())
    return Gauge.storing(Affine(lead(compact(scale), rank), lead(compact(shift), rank)))


def lead(values: Tensor, rank: int) -> Tensor:
    """`values` with leading dimensions of size 1 up to `rank`."""
    return values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))


def close(left: Tensor, right: Tensor) -> bool:
    """Whether two scales are the same, to 1e-11."""
    left, right = torch.broadcast_tensors(left, right)
    return torch.allclose(left, right, rtol=1e-11, atol=0.0)


def fill(node: Node, wanted: Alternative, gauges: Gauges) -> list[Alternative]:
    """`wanted` less what is set already, which must agree."""
    more: Alternative = {}
    for value, gauge in wanted.items():
        if value not in gauges:
            more[value] = gauge
        elif not gauges[value].agrees_with(gauge):
            raise Refusal(
                f"{value.name} is read by others that need it otherwise than "
                f"{node.label} does"
            )
    return [more]


def carry_one(node: Node, gauges: Gauges) -> list[Alternative]:
    """One input and one output, element for element."""
    x, y = node.inputs[0], node.outputs[0]
    if x in gauges:
        return fill(node, {y: gauges[x]}, gauges)
    if y in gauges:
        return fill(node, {x: gauges[y]}, gauges)
    return NOTHING_MORE


def needs_channels_only(gauge: Gauge, dim: int, label: str, does: str) -> None:
    """Refuse a map that depends on any dimension but `dim`."""
    others = [d for d in gauge.depends_on if d != dim]
    if others:
        raise Refusal(
            f"{label} {does} along dimension {dim}, "
            f"the map changes along dimension {others[0]}"
        )


def stored_direction(gauge: Gauge, label: str) -> Affine:
    """True → stored, which `label` needs."""
    if gauge.to_stored is None:
        raise Refusal(f"{label} cannot take back a scale of 0")
    return gauge.to_stored


def true_direction(gauge: Gauge, label: str) -> Affine:
    """Stored → true, which `label` needs."""
    if gauge.to_true is None:
        raise Refusal(f"{label} cannot take back a scale of 0")
    return gauge.to_true


def editable(slot: Slot | None, label: str, what: str = "parameter") -> Slot:
    """`slot` if it may be edited."""
    if slot is None:
        raise Refusal(f"{label} has no {what} to change")
    if slot.locked:
        raise Refusal(f"{slot.name} {slot.locked}")
    return slot
