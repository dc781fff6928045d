"""Nodes that commute with a map that does not change inside their windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normkit.fold.gauge import Gauge
from normkit.fold.graph import Gauges, Refusal
from normkit.fold.nodes.node import (
    NOTHING_MORE,
    Alternative,
    Node,
    fill,
    fit,
    lead,
)

__all__ = ["Mix", "Through"]


@dataclass(eq=False, repr=False)
class Through(Node):
    """What commutes with a map that does not change inside its windows.

    relu(s·x) = s·relu(x) for s ≥ 0; max and mean also carry a shift; a mean, any sign.

    Attributes:
        mixes: The dimensions of x over which elements are combined.
        dropped: Those of them that the output lacks.
        bears_shift: Whether f(x + t) = f(x) + t.
        bears_negative: Whether f(−x) = −f(x).
        why_no_shift: For the ledger.
    """

    mixes: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    bears_shift: bool = False
    bears_negative: bool = False
    why_no_shift: str = "lets a scale through, not a shift"

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """The same map on both sides."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        x, y = self.inputs[0], self.outputs[0]
        wanted: Alternative = {}
        if x in gauges:
            gauge = gauges[x]
            self._check(gauge)
            wanted[y] = gauge.map(self._drop)
        else:
            gauge = gauges[y].map(self._restore)
            self._check(gauge)
            wanted[x] = gauge
        return fill(self, wanted, gauges)

    def _check(self, gauge: Gauge) -> None:
        rank = len(self.inputs[0].shape)
        mixes = {dim % rank for dim in self.mixes}
        if mixes & set(gauge.depends_on):
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        if gauge.has_shift and not self.bears_shift:
            raise Refusal(f"{self.label} {self.why_no_shift}")
        if not gauge.is_positive and not self.bears_negative:
            raise Refusal(f"{self.label} lets no negative scale through")

    def _drop(self, values: Tensor) -> Tensor:
        rank = len(self.inputs[0].shape)
        for dim in sorted({d % rank for d in self.dropped}, reverse=True):
            values = values.squeeze(dim)
        return values

    def _restore(self, values: Tensor) -> Tensor:
        rank = len(self.inputs[0].shape)
        for dim in sorted({d % rank for d in self.dropped}):
            values = values.unsqueeze(dim)
        return values


@dataclass(eq=False, repr=False)
class Mix(Node):
    """A·v or v·A, where A depends on the input: inputs are [v, what makes A].

    Attributes:
        mixed_dim: The dimension of v that the product sums over: -2 for A·v.
        rows_sum_to_one: Whether A is a softmax over the dimension summed over.
    """

    mixed_dim: int = -2
    rows_sum_to_one: bool = False

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """A map of v's other dimension, with its shift if the rows of A sum to 1."""
        v, y = self.inputs[0], self.outputs[0]
        for value in self.inputs[1:]:
            if gauges.moved(value) and value is not v:
                raise Refusal(
                    f"{self.label} reads {value.name} and bears no change of it"
                )
        if not gauges.moved(v) and not gauges.moved(y):
            return NOTHING_MORE
        if v in self.inputs[1:]:
            raise Refusal(f"{self.label} reads {v.name} twice")
        wanted: Alternative = {
            value: Gauge.identity(len(value.shape)) for value in self.inputs[1:]
        }
        gauge = gauges.of(v if v in gauges else y)
        if gauge.has_shift and not self.rows_sum_to_one:
            raise Refusal(f"{self.label} weighs rows by factors that do not sum to 1")
        if gauge.rank + self.mixed_dim in gauge.depends_on:
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        if v in gauges:
            wanted[y] = gauge.map(lambda t: lead(t, len(y.shape)))
        else:
            fitted = fit(gauge, v.shape)
            if fitted is None:
                raise Refusal(f"{self.label} broadcasts {v.name}")
            wanted[v] = fitted
        return fill(self, wanted, gauges)
