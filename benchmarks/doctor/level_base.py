"""Common parts of the healthy programs of level_runs.py: register, tables, rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from calm_base import Data
from quiet_base import Training, split
from torch import Tensor, nn

__all__ = ["PROGRAMS", "columns", "layered", "program", "pulled"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def columns(x: Tensor, y: Any, train: int) -> tuple[Data, Data]:
    """Return rows to train on and held-out ones, columns standardized by the first."""
    return split((x - x[:train].mean(0)) / x[:train].std(0), y, train)


def layered(parts: list[nn.Module], rate: float, factor: float) -> list[dict[str, Any]]:
    """Return groups whose rate falls by `factor` from each part to the one before."""
    return [
        {"params": list(part.parameters()), "lr": rate / factor**i}
        for i, part in enumerate(reversed(parts))
    ]


def pulled(a: Tensor, b: Tensor) -> float:
    """Return minus the mean distance to the nearest point, of both sets, both ways."""
    away = torch.cdist(a, b)
    return -float(away.amin(0).mean() + away.amin(1).mean())
