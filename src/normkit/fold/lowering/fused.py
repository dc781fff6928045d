"""Batch norm, sum and activation that run as one operation, read as three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from normkit.functional import batch_norm
from normkit.kernels.epilogue import activate

__all__ = ["one_by_one"]


def one_by_one(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """The same call in its parts; None if it has one, or writes zeros at the end."""
    if func is not batch_norm or kwargs.get("mask") is not None:
        return None
    plain = dict(kwargs)
    activation = plain.pop("activation", "none")
    slope = plain.pop("negative_slope", 0.01)
    residual = plain.pop("residual", None)
    if activation == "none" and residual is None:
        return None

    def run() -> Tensor:
        y = batch_norm(*args, **plain)
        if residual is not None:
            y = y + residual
        return activate(activation, y, slope)

    return run
