"""Batch norm, sum and activation that run as one operation, read as three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normkit.fold.nodes import BatchNorm, Node
from normkit.functional import batch_norm
from normkit.kernels.epilogue import activate

__all__ = ["OneByOne", "one_by_one"]


@dataclass
class OneByOne:
    """A fused call, to be run in its parts."""

    args: tuple[Any, ...]
    plain: dict[str, Any]
    residual: Tensor | None
    activation: str
    slope: float

    def run(self) -> Tensor:
        """The values."""
        y = batch_norm(*self.args, **self.plain)
        if self.residual is not None:
            y = y + self.residual
        return activate(self.activation, y, self.slope)

    def tell(self, nodes: list[Node]) -> None:
        """Let the batch norm among the nodes of the parts know what follows it."""
        for at, node in enumerate(nodes):
            if isinstance(node, BatchNorm):
                node.followers = nodes[at + 1 :]
                node.activation, node.slope = self.activation, self.slope
                return


def one_by_one(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> OneByOne | None:
    """The parts of a call; None if it has one, or writes zeros at the end."""
    if func is not batch_norm or kwargs.get("mask") is not None:
        return None
    plain = dict(kwargs)
    activation = plain.pop("activation", "none")
    slope = plain.pop("negative_slope", 0.01)
    residual = plain.pop("residual", None)
    if activation == "none" and residual is None:
        return None
    return OneByOne(args, plain, residual, activation, slope)
