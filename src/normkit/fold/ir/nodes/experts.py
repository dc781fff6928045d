"""Mixtures of experts: rows and matrices that the model's input picks by number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normkit.fold.ir.gauge import per_channel
from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Slot,
    Value,
)
from normkit.fold.ir.nodes.parameters import edit_value, read
from normkit.fold.ir.nodes.rules import (
    agree,
    needs_channels_only,
    true_direction,
    unchanged,
)

__all__ = ["Experts", "Rows"]


@dataclass(eq=False, repr=False)
class Rows(Node):
    """x[index] over the first dimensions of x: inputs are [x, index].

    Attributes:
        taken: Number of dimensions of x that the index stands for.
    """

    taken: int = 1

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit a map that is the same for all rows."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        x, index, y = *self.inputs, self.outputs[0]
        if gauges.changed(index):
            raise Refusal(f"{self.label} picks by {index.name}")
        picked = len(y.shape) - len(x.shape) + self.taken
        old, new = (self.taken, picked) if x in gauges else (picked, self.taken)
        gauge = gauges.of(x if x in gauges else y)
        if any(dim < old for dim in gauge.depends_on):
            raise Refusal(f"{self.label} picks rows that are mapped differently")

        def moved(values: Tensor) -> Tensor:
            return values.reshape((1,) * new + tuple(values.shape[old:]))

        wanted = unchanged(index) | {(y if x in gauges else x): gauge.map(moved)}
        return agree(self, wanted, gauges)


@dataclass(eq=False, repr=False)
class Experts(Node):
    """x·W[e] with a stack W of matrices; the input picks e.

    All matrices are edited at once, those that no row went to as well.

    Attributes:
        weight: W, three-dimensional.
        picked: The matrices that were picked, for the readers of W.
        bias: What is added, picked or not; None for nothing.
        input_dim: The dimension of x that is contracted.
        weight_dim: The dimension of W that is.
    """

    weight: Value | None = None
    picked: Value | None = None
    bias: Value | None = None
    input_dim: int = -1
    weight_dim: int = 2

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit a scale of the input."""
        for value in self.outputs:
            if gauges.changed(value):
                raise Refusal(f"nothing can be moved into {self.label}, a choice of W")
        if gauges.changed(self.inputs[0]):
            self.edits(gauges)
        missing = [value for value in self.outputs if value not in gauges]
        return [unchanged(*missing)] if missing else NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the stack with the scale folded in."""
        x = self.inputs[0]
        if not gauges.changed(x):
            return {}
        assert self.weight is not None
        gauge = gauges.of(x)
        if gauge.has_shift:
            raise Refusal(f"{self.label} has no bias for each expert")
        dim = self.input_dim % len(x.shape)
        needs_channels_only(gauge, dim, self.label, "contracts")
        before = per_channel(true_direction(gauge, self.label), dim, x.shape[dim])
        shape = [1] * len(self.weight.shape)
        shape[self.weight_dim] = -1
        scaled = read(self.weight) * before.scale.reshape(shape)
        return edit_value(self.weight, scaled, self.label)
