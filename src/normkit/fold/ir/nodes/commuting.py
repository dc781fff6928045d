"""Operations that commute with a map which is constant inside their windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normkit.fold.ir.gauge import Gauge
from normkit.fold.ir.graph import NOTHING_MORE, Alternative, Gauges, Node, Refusal
from normkit.fold.ir.nodes.rules import agree

__all__ = ["COUNTS_PADDING", "Commuting"]

COUNTS_PADDING = "averages over zero padding, where a shift would be missing"


@dataclass(eq=False, repr=False)
class Commuting(Node):
    """An operation that commutes with a map which is constant inside its windows.

    relu(s·x) = s·relu(x) for s ≥ 0; max and mean also pass a shift; a mean, any sign.

    Attributes:
        combined_dims: The dimensions of x over which elements are combined.
        dropped_dims: Those of them that the output lacks.
        passes_shift: Whether f(x + t) = f(x) + t.
        passes_negative: Whether f(−x) = −f(x).
        why_no_shift: For the ledger.
    """

    combined_dims: tuple[int, ...] = ()
    dropped_dims: tuple[int, ...] = ()
    passes_shift: bool = False
    passes_negative: bool = False
    why_no_shift: str = "lets a scale through, not a shift"

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Give both sides the same map."""
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
        return agree(self, wanted, gauges)

    def _check(self, gauge: Gauge) -> None:
        rank = len(self.inputs[0].shape)
        combined = {dim % rank for dim in self.combined_dims}
        if combined & set(gauge.depends_on):
            raise Refusal(f"{self.label} combines elements that are mapped differently")
        if gauge.has_shift and not self.passes_shift:
            raise Refusal(f"{self.label} {self.why_no_shift}")
        if not gauge.is_positive and not self.passes_negative:
            raise Refusal(f"{self.label} lets no negative scale through")

    def _dropped(self) -> list[int]:
        rank = len(self.inputs[0].shape)
        return sorted({dim % rank for dim in self.dropped_dims})

    def _drop(self, values: Tensor) -> Tensor:
        for dim in reversed(self._dropped()):
            values = values.squeeze(dim)
        return values

    def _restore(self, values: Tensor) -> Tensor:
        for dim in self._dropped():
            values = values.unsqueeze(dim)
        return values
