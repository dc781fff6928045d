"""The record of `watch` as scalars, for the programs that draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["scalars", "scalars_by_step"]


def scalars(history: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Yield `(tag, value, step)` for every finite number of a `Watch.history`.

    The tag is `normkit/SERIES/LAYER`, so that one chart holds one quantity; numbers
    given to `log` are `normkit/NAME`.
    """
    for name, series in history["layers"].items():
        for key, values in series.items():
            if not isinstance(values, list):
                continue
            for step, value in zip(history["steps"], values, strict=True):
                if value is not None and math.isfinite(value):
                    yield f"normkit/{key}/{name or 'model'}", value, step
    for name, pairs in history["logged"].items():
        for step, value in pairs:
            yield f"normkit/{name}", value, step


def scalars_by_step(history: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Return the scalars of each step by their tags, in the order of the steps."""
    found: dict[int, dict[str, float]] = {}
    for tag, value, step in scalars(history):
        found.setdefault(step, {})[tag] = value
    return dict(sorted(found.items()))
