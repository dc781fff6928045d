"""Batch norm, sum and activation in one call, traced as three operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normkit.fold.ir.graph import Node
from normkit.fold.ir.nodes import BatchNorm
from normkit.functional import batch_norm
from normkit.kernels.epilogue import activate

__all__ = ["FusedCall", "unfused"]


@dataclass
class FusedCall:
    """The parts of a fused call."""

    args: tuple[Any, ...]
    plain: dict[str, Any]
    residual: Tensor | None
    activation: str
    slope: float

    def run(self) -> Tensor:
        """Return the result, computed part by part."""
        y = batch_norm(*self.args, **self.plain)
        if self.residual is not None:
            y = y + self.residual
        return activate(self.activation, y, self.slope)

    def annotate(self, nodes: list[Node]) -> None:
        """Record the other parts at the batch norm among the `nodes` of a run."""
        for at, node in enumerate(nodes):
            if isinstance(node, BatchNorm):
                node.epilogue = nodes[at + 1 :]
                node.activation, node.slope = self.activation, self.slope
                return


def unfused(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FusedCall | None:
    """Return the parts of a call; None if it has one, or writes zeros at the end."""
    if func is not batch_norm or kwargs.get("mask") is not None:
        return None
    plain = dict(kwargs)
    activation = plain.pop("activation", "none")
    slope = plain.pop("negative_slope", 0.01)
    residual = plain.pop("residual", None)
    if activation == "none" and residual is None:
        return None
    return FusedCall(args, plain, residual, activation, slope)
