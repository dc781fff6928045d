"""Checks of the arguments of `calibrate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from normkit.errors import ArgumentError

__all__ = ["check_arguments", "check_repeatable"]


def check_arguments(
    mode: str,
    order: str,
    momentum: float | None,
    keep: float,
    max_batches: int | None,
    tolerance: float | None,
    on_nonfinite: str,
) -> None:
    """Refuse values and combinations that have no meaning."""
    choices = {
        "mode": (mode, ("exact", "average", "running")),
        "order": (order, ("train", "eval")),
        "on_nonfinite": (on_nonfinite, ("skip", "raise")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ArgumentError(f"{name}={value!r} must be one of {allowed}")
    if mode == "running" and order == "eval":
        raise ArgumentError(
            "order='eval' measures each layer over the whole data; a running average "
            "keeps the last batches only: use mode='exact' or 'average'"
        )
    if momentum is not None and mode != "running":
        raise ArgumentError(
            f"momentum={momentum} has no meaning for mode={mode!r}, which weights all "
            "data the same; drop it or use mode='running'"
        )
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ArgumentError(
            f"momentum={momentum} must lie in [0, 1], the share of the new value; a "
            "decay of 0.9 is momentum=0.1"
        )
    if not 0.0 <= keep <= 1.0:
        raise ArgumentError(
            f"keep={keep} must lie in [0, 1], the share of the old value"
        )
    if max_batches is not None and max_batches < 1:
        raise ArgumentError(f"max_batches={max_batches} must be at least 1")
    if tolerance is not None and (mode == "running" or not tolerance > 0):
        raise ArgumentError(
            f"tolerance={tolerance} must be positive, a distance such as 0.02, and has "
            f"no meaning for a running average (mode={mode!r})"
        )


def check_repeatable(batches: Iterable[Any], order: str) -> None:
    """Refuse batches that come only once where `order` takes several passes."""
    if order == "eval" and iter(batches) is batches:
        raise ArgumentError(
            "order='eval' goes through the data once per layer, but batches is an "
            f"iterator ({type(batches).__name__}) that ends after one; pass a "
            "DataLoader or a list"
        )
