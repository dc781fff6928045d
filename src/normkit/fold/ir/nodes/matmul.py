"""Products of two matrices that both depend on the model's input: attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Value,
)
from normkit.fold.ir.nodes.move import Move
from normkit.fold.ir.nodes.rules import Opaque, agree, carry, unchanged

__all__ = ["MatMul", "matmul"]


@dataclass(eq=False, repr=False)
class MatMul(Node):
    """A·v or v·A, where A depends on the input: inputs are [v, what A is made of].

    Attributes:
        contracted_dim: The dimension of v that the product sums over: -2 for A·v.
        rows_sum_to_one: Whether A is a softmax over the dimension summed over.
    """

    contracted_dim: int = -2
    rows_sum_to_one: bool = False

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit a map of v's other dimension; its shift if the rows of A sum to 1."""
        v, y = self.inputs[0], self.outputs[0]
        for value in self.inputs[1:]:
            if gauges.changed(value) and value is not v:
                raise Refusal(
                    f"{self.label} reads {value.name} and permits no change of it"
                )
        if not gauges.changed(v) and not gauges.changed(y):
            return NOTHING_MORE
        if v in self.inputs[1:]:
            raise Refusal(f"{self.label} reads {v.name} twice")
        wanted = unchanged(*self.inputs[1:])
        gauge = gauges.of(v if v in gauges else y)
        if gauge.has_shift and not self.rows_sum_to_one:
            raise Refusal(f"{self.label} weighs rows by factors that do not sum to 1")
        if gauge.rank + self.contracted_dim in gauge.depends_on:
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        carry(self, v, y, wanted, gauges)
        return agree(self, wanted, gauges)


def matmul(label: str, left: Value, right: Value) -> MatMul:
    """Return the node of left·right; v is the factor that is not the softmax."""
    if _sums_to_one(right, -2) and not _sums_to_one(left, -1):
        return MatMul(label, [left, right], contracted_dim=-1, rows_sum_to_one=True)
    return MatMul(label, [right, left], rows_sum_to_one=_sums_to_one(left, -1))


def _sums_to_one(value: Value, dim: int) -> bool:
    """Return True if `value` is a softmax over `dim`, also when its rows were moved."""
    dim = dim % len(value.shape)
    node = value.producer
    if isinstance(node, Opaque) and node.softmax_dim is not None:
        return node.softmax_dim % len(value.shape) == dim
    if not isinstance(node, Move) or len(node.inputs) != 1:
        return False
    source = node.inputs[0]
    if node.replay is None:
        return _sums_to_one(source, dim)
    # Each row along `dim` must be one whole row of the source along some dim.
    numbers = torch.arange(math.prod(source.shape), dtype=torch.float64)
    rows = node.replay([numbers.reshape(source.shape)])[0].movedim(dim, -1)
    for source_dim, width in enumerate(source.shape):
        if rows.shape[-1] != width:
            continue
        step = math.prod(source.shape[source_dim + 1 :])
        offsets = torch.arange(width, dtype=torch.float64) * step
        is_whole = bool((rows == rows[..., :1] + offsets).all())
        starts = (rows[..., 0] // step) % width == 0
        if is_whole and bool(starts.all()) and _sums_to_one(source, source_dim):
            return True
    return False
