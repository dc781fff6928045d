"""Steps that the rules of several nodes share, and the node that permits nothing."""

from __future__ import annotations

from dataclasses import dataclass

from normkit.affine import Affine
from normkit.fold.ir.gauge import Gauge, fit, with_rank
from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Value,
)

__all__ = [
    "Opaque",
    "agree",
    "carry",
    "copy_gauge",
    "needs_channels_only",
    "stored_direction",
    "true_direction",
    "unchanged",
]


@dataclass(eq=False, repr=False)
class Opaque(Node):
    """An operation without a rule, or one that commutes with nothing.

    Attributes:
        softmax_dim: The dimension over which its output sums to 1, if it is a softmax.
    """

    softmax_dim: int | None = None

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Refuse any change around it."""
        for value in self.inputs:
            if gauges.changed(value):
                raise Refusal(
                    f"{self.label} reads {value.name} and permits no change of it"
                )
        for value in self.outputs:
            if gauges.changed(value):
                raise Refusal(f"nothing can be moved into {self.label}")
        return NOTHING_MORE


def agree(node: Node, wanted: Alternative, gauges: Gauges) -> list[Alternative]:
    """Return `wanted` less the gauges that are set already, which must agree."""
    more: Alternative = {}
    for value, gauge in wanted.items():
        if value not in gauges:
            more[value] = gauge
        elif not gauges[value].agrees_with(gauge):
            raise Refusal(
                f"{value.name} has other readers, which need another scale or shift "
                f"than {node.label} does"
            )
    return [more]


def copy_gauge(node: Node, gauges: Gauges) -> list[Alternative]:
    """Give the one input and the one output of `node` the same gauge."""
    x, y = node.inputs[0], node.outputs[0]
    if x in gauges:
        return agree(node, {y: gauges[x]}, gauges)
    if y in gauges:
        return agree(node, {x: gauges[y]}, gauges)
    return NOTHING_MORE


def carry(node: Node, x: Value, y: Value, wanted: Alternative, gauges: Gauges) -> None:
    """Add to `wanted` the gauge of x for y, or that of y for x.

    Raises:
        Refusal: x is broadcast to y along a dimension in which the gauge changes.
    """
    if x in gauges:
        wanted[y] = gauges[x].map(lambda t: with_rank(t, len(y.shape)))
        return
    fitted = fit(gauges.of(y), x.shape)
    if fitted is None:
        raise Refusal(f"{node.label} broadcasts {x.name}")
    wanted[x] = fitted


def unchanged(*values: Value) -> Alternative:
    """Return the identity for each of `values`."""
    return {value: Gauge.identity(len(value.shape)) for value in values}


def needs_channels_only(gauge: Gauge, dim: int, label: str, verb: str) -> None:
    """Refuse a map that depends on any dimension but `dim`."""
    others = [d for d in gauge.depends_on if d != dim]
    if others:
        raise Refusal(
            f"{label} {verb} along dimension {dim}, "
            f"the map changes along dimension {others[0]}"
        )


def stored_direction(gauge: Gauge, label: str) -> Affine:
    """Return true → stored, which `label` needs."""
    if gauge.to_stored is None:
        raise Refusal(f"{label} cannot invert a scale of 0")
    return gauge.to_stored


def true_direction(gauge: Gauge, label: str) -> Affine:
    """Return stored → true, which `label` needs."""
    if gauge.to_true is None:
        raise Refusal(f"{label} cannot invert a scale of 0")
    return gauge.to_true
